"""Small modules that meta-learning code uses."""

from fastmeta.compat.learn2learn.nn.kroneckers import KroneckerLinear
from fastmeta.compat.learn2learn.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze

__all__ = ["Flatten", "KroneckerLinear", "Lambda", "Scale", "freeze", "unfreeze"]

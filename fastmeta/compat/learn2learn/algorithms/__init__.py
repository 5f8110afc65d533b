"""Algorithms: wrappers of a module that are cloned for a task and adapted by a loss."""

from fastmeta.compat.learn2learn.algorithms.base_learner import BaseLearner
from fastmeta.compat.learn2learn.algorithms.gbml import GBML
from fastmeta.compat.learn2learn.algorithms.maml import MAML, maml_update
from fastmeta.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]

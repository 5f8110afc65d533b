"""learn2learn's meta-learning core under its own names: ``import fastmeta.compat.learn2learn as l2l``.

Signatures and results are those of learn2learn 0.2 (S. Arnold, P. Mahajan, D. Datta, I. Bunner, K. Zarkias, 2020);
docs/migrating.md lists where they differ, and shows the three lines that hand the same meta-step to the engine. The
loop itself has one node of autograd's graph for a perceptron's inner step (``compat/perceptron.py``).
"""

from __future__ import annotations

from typing import NoReturn

from fastmeta.compat.learn2learn import algorithms, nn, optim, utils
from fastmeta.compat.learn2learn.utils import (
    accuracy,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_module,
    magic_box,
    update_module,
)

__all__ = [
    "accuracy",
    "algorithms",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "detach_module",
    "magic_box",
    "nn",
    "optim",
    "update_module",
    "utils",
]

_ELSEWHERE = {
    "data": "fastmeta.tasks has task batches, episode samplers and Omniglot",
    "gym": "fastmeta has no environments",
    "text": "fastmeta has no text data sets",
    "vision": "fastmeta.tasks has Omniglot and fastmeta.models a convolutional network; torchvision has the rest",
}


def __getattr__(name: str) -> NoReturn:
    where = f"; {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
    raise AttributeError(f"fastmeta.compat.learn2learn: name must be one of {', '.join(__all__)}, got {name!r}{where}")

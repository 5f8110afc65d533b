"""Training and evaluation mode of a learner's modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastmeta.algorithms.maml import MAML


def modes(learner: MAML) -> list[bool]:
    """The training flag of every module."""
    return [module.training for module in learner.modules()]


def set_modes(learner: MAML, flags: list[bool]) -> None:
    """Put back what :func:`modes` gave."""
    for module, training in zip(learner.modules(), flags, strict=True):
        module.training = training


def rest(learner: MAML) -> None:
    """Put every module in evaluation mode: dropout is off.

    Batch norm that was in training mode stays so where training leaves no running statistics: it goes on normalising by
    the set that it is given, as it has learned to.
    """
    for module in learner.modules():
        transductive = isinstance(module, nn.modules.batchnorm._BatchNorm) and not learner.update_running_stats
        module.training = module.training and transductive


@contextmanager
def at_rest(learner: MAML) -> Iterator[None]:
    """:func:`rest` for a while."""
    flags = modes(learner)
    rest(learner)
    try:
        yield
    finally:
        set_modes(learner, flags)

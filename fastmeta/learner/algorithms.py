"""Which algorithm a run trains with, by name, and what of it a checkpoint holds beside the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastmeta import algorithms
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.maml_plus_plus import MAMLPlusPlus
from fastmeta.core import checks
from fastmeta.learner import checkpoint
from fastmeta.learner.config import TrainConfig
from fastmeta.learner.problems import Problem

CLASSES = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "anil": "ANIL",
    "boil": "BOIL",
    "metasgd": "MetaSGD",
    "reptile": "Reptile",
    "imaml": "IMAML",
    "protomaml": "ProtoMAML",
    "mamlpp": "MAMLPlusPlus",
    "metacurvature": "MetaCurvature",
}
EPOCHS = 150  # of a run, by which MAML++ anneals: those of its authors
ORDERED = ("maml", "anil", "boil", "metasgd", "protomaml", "metacurvature")  # those of either order


def learner_of(config: TrainConfig, problem: Problem) -> MAML:
    """The algorithm of the settings around a problem's network.

    Raises:
        ValueError: the algorithm does not go with the problem, or with first order.
    """
    name = config.algorithm
    if name == "protomaml" and problem.metric != "accuracy":
        checks.fail(ValueError, "train", "algorithm", f"one without prototypes for {config.problem}", repr(name))
    options: dict[str, Any] = {}
    if name in ORDERED:
        options["first_order"] = config.first_order
    elif config.first_order:
        checks.fail(ValueError, "train", "first_order", f"left out with algorithm {name}", True)
    if name == "imaml":
        options["cg_steps"] = 5
    made: MAML = getattr(algorithms, CLASSES[name])(
        problem.model, problem.loss, lr=config.inner_lr, steps=config.inner_steps, **options
    )
    return made


def at_step(learner: MAML, step: int, iterations: int) -> None:
    """Tell a learner that has schedules how far the run is."""
    if isinstance(learner, MAMLPlusPlus):
        learner.epoch = EPOCHS * step // iterations


def weights_of(learner: MAML) -> dict[str, Tensor]:
    """What a checkpoint holds of a learner: the model under ``model``, what else is learned under ``algorithm``."""
    state = learner.state_dict()
    return {name if name.startswith("model.") else f"algorithm.{name}": value for name, value in state.items()}


def load_weights(learner: MAML, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Put back what :func:`weights_of` gave.

    Raises:
        ValueError: names, shapes or dtypes do not fit.
    """
    model = {name: value for name, value in tensors.items() if name.startswith("model.")}
    checkpoint.load_module(learner, model | checkpoint.under("algorithm", tensors), origin)

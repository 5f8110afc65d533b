"""Which algorithm a run trains with, by name, and what of it a checkpoint holds beside the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta import algorithms
from fastmeta.algorithms.adapted import deep_copy
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.maml_plus_plus import MAMLPlusPlus
from fastmeta.core import checks
from fastmeta.learner import checkpoint
from fastmeta.learner.config import TrainConfig
from fastmeta.learner.models import Modulated, read_context
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
    "cavia": "CAVIA",
    "mamlpp": "MAMLPlusPlus",
    "metacurvature": "MetaCurvature",
}
EPOCHS = 150  # of a run, by which MAML++ anneals: those of its authors
ORDERED = ("maml", "anil", "boil", "metasgd", "protomaml", "cavia", "metacurvature")  # those of either order


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
    if name == "cavia":
        options["context"] = config.context
        options["condition"] = read_context if isinstance(problem.model, Modulated) else None
    made: MAML = getattr(algorithms, CLASSES[name])(
        problem.model, problem.loss, lr=config.inner_lr, steps=config.inner_steps, **options
    )
    return made


def class_of(name: str) -> type[MAML]:
    """The class of an algorithm, by the name that the command line or the package has for it, in any case.

    Raises:
        ValueError: there is none of that name.
    """
    known = {n.lower(): n for n in algorithms.__all__ if n != "MetaOutput"} | CLASSES
    checks.one_of("MetaLearner", "algorithm", name.lower(), known)
    found: type[MAML] = getattr(algorithms, known[name.lower()])
    return found


def loss_of(loss: str | Callable[..., Any] | None) -> Callable[..., Any]:
    """A loss by the name of a function of ``torch.nn.functional``, such as ``"cross_entropy"``; a callable as it is.

    Raises:
        TypeError: neither.
        ValueError: there is no such function.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str):
        checks.fail(TypeError, "MetaLearner", "loss", "a callable or a name such as 'cross_entropy'", repr(loss))
    known = [n for n in vars(F) if n.endswith(("_loss", "cross_entropy", "with_logits", "kl_div")) and n[0] != "_"]
    checks.one_of("MetaLearner", "loss", loss, known)
    found: Callable[..., Any] = getattr(F, loss)
    return found


def make_learner(
    model: nn.Module | None,
    algorithm: str | MAML | Callable[..., MAML],
    loss: str | Callable[..., Any] | None,
    options: Mapping[str, Any],
) -> MAML:
    """An algorithm around a copy of ``model``, or a copy of a configured one.

    Args:
        model: the model; of an instance ``None``, or the one it holds.
        algorithm: its name, its class, anything that is called as a class is, or an instance.
        loss: as :func:`loss_of` has it; of an instance ``None``.
        options: the other arguments; of an instance none.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an unknown name, or arguments that an instance has already.
    """
    if isinstance(algorithm, MAML):
        if model is not None and not any(module is model for module in algorithm.modules()):
            checks.fail(ValueError, "MetaLearner", "model", "None or the instance's own", "another model")
        given = [*(["loss"] if loss is not None else []), *options]
        if given:
            checks.fail(ValueError, "MetaLearner", "algorithm", f"a class where {given} are given", "an instance")
        return deep_copy(algorithm)
    if not isinstance(model, nn.Module):
        checks.fail(TypeError, "MetaLearner", "model", "a torch.nn.Module", type(model).__name__)
    if not isinstance(algorithm, str) and not callable(algorithm):
        wanted = "a name, a class or an instance of an algorithm"
        checks.fail(TypeError, "MetaLearner", "algorithm", wanted, type(algorithm).__name__)
    make = class_of(algorithm) if isinstance(algorithm, str) else algorithm
    own_loss = loss_of(loss)
    options = {name: copy.deepcopy(value) for name, value in options.items()}  # rates that are learned start anew
    made = make(deep_copy(model), deep_copy(own_loss) if isinstance(own_loss, nn.Module) else own_loss, **options)
    if not isinstance(made, MAML):
        checks.fail(TypeError, "MetaLearner", "algorithm", "what makes an algorithm of fastmeta", type(made).__name__)
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

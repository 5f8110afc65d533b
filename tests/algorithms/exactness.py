"""The error of each algorithm's meta-gradient, in float64, against its explicit loop over tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmeta as fm
from tests.algorithms import test_cavia, test_imaml, test_maml_plus_plus, test_meta_curvature, test_proto_maml
from tests.algorithms.problems import labelled, network
from tests.algorithms.test_simple import BODY, HEAD, adapted_by_hand
from tests.oracle import maml_loop, relative_error

LR, STEPS = 0.2, 3


def errors() -> dict[str, float]:
    """By the names that ``fastmeta train --algorithm`` has."""
    return {name: relative_error(*pair()) for name, pair in _PAIRS.items()}


Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


def _by_the_loop(made: type[fm.MAML], first_order: bool = False, names: list[str] | None = None) -> Callable[[], Pair]:
    def pair() -> Pair:
        model, tasks = network(), labelled()
        learner = made(model, F.cross_entropy, LR, STEPS)
        lr: Any = LR
        if made is fm.MetaSGD:
            lr = {n: torch.full_like(p, LR).requires_grad_() for n, p in model.named_parameters()}
        truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, STEPS, first_order, names)
        return learner.value_and_grad(tasks)[1], truth[3]

    return pair


def _derivatives(loss: Tensor, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _reptile() -> Pair:
    model, tasks = network(), labelled()
    phis = adapted_by_hand(model, tasks, LR, STEPS)
    truth = {
        n: p.detach() - torch.stack([phi[n].detach() for phi in phis]).mean(0) for n, p in model.named_parameters()
    }
    return fm.Reptile(model, F.cross_entropy, LR, STEPS).value_and_grad(tasks)[1], truth


def _imaml() -> Pair:
    model, tasks = network(), labelled()
    truth = test_imaml.dense(model, F.cross_entropy, tasks, [n for n, _ in model.named_parameters()])
    learner = fm.IMAML(model, F.cross_entropy, LR, 40, strength=test_imaml.STRENGTH, cg_steps=40, tolerance=1e-12)
    return learner.value_and_grad(tasks)[1], truth


def _proto_maml() -> Pair:
    model, tasks = network(), labelled()
    loss = test_proto_maml.by_hand(model, tasks, LR, STEPS, BODY, False)[0]
    body = {n: p for n, p in model.named_parameters() if n in BODY}
    return fm.ProtoMAML(model, F.cross_entropy, LR, STEPS).value_and_grad(tasks)[1], _derivatives(loss, body)


def _cavia() -> Pair:
    model, tasks = network(features=6), labelled()
    loss, _ = test_cavia.by_hand(lambda x, c: model(torch.cat([x, c.repeat(len(x), 1)], 1)), (2,), tasks, STEPS)
    learner = fm.CAVIA(model, F.cross_entropy, 0.5, STEPS, context=2)
    named = {f"model.{n}": p for n, p in model.named_parameters()}
    return learner.value_and_grad(tasks)[1], _derivatives(loss, named)


def _maml_plus_plus() -> Pair:
    model, tasks = test_maml_plus_plus.normed(), test_maml_plus_plus.images()
    learner = fm.MAMLPlusPlus(model, F.cross_entropy, LR, STEPS)
    test_maml_plus_plus.shaken(learner)
    truth = test_maml_plus_plus.by_hand(learner, tasks, test_maml_plus_plus.CONV, learner.loss_weights())[2]
    return learner.value_and_grad(tasks)[1], truth


def _meta_curvature() -> Pair:
    model, tasks = network(), labelled()
    rates = torch.full((STEPS,), LR, dtype=torch.float64)
    learner = fm.MetaCurvature(model, F.cross_entropy, rates, STEPS)
    test_meta_curvature.shaken(learner)
    return learner.value_and_grad(tasks)[1], _derivatives(*test_meta_curvature.by_hand(learner, tasks, rates))


_PAIRS: dict[str, Callable[[], Pair]] = {
    "maml": _by_the_loop(fm.MAML),
    "fomaml": _by_the_loop(fm.FOMAML, first_order=True),
    "anil": _by_the_loop(fm.ANIL, names=HEAD),
    "boil": _by_the_loop(fm.BOIL, names=BODY),
    "metasgd": _by_the_loop(fm.MetaSGD),
    "reptile": _reptile,
    "imaml": _imaml,
    "protomaml": _proto_maml,
    "cavia": _cavia,
    "mamlpp": _maml_plus_plus,
    "metacurvature": _meta_curvature,
}

"""Every algorithm takes another number of inner steps than it is trained with, at rates that are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.algorithms.problems import EXACT, labelled, network
from tests.algorithms.test_simple import BODY, HEAD
from tests.oracle import maml_loop, relative_error

TRAINED, MORE = 2, 4
RATES = torch.tensor([0.4, 0.15], dtype=torch.float64)

Made = Callable[..., fm.MAML]


def meta_sgd(model: nn.Module, loss: Any, lr: Tensor, steps: int) -> fm.MAML:
    return fm.MetaSGD(model, loss, float(lr.detach()[-1]), steps)


def maml_plus_plus(model: nn.Module, loss: Any, lr: Tensor, steps: int) -> fm.MAML:
    learner = fm.MAMLPlusPlus(model, loss, steps=steps, multi_step_epochs=0)
    with torch.no_grad():
        learner.lr.copy_(lr.detach().unsqueeze(1))
    return learner


def cavia(_: nn.Module, loss: Any, lr: Tensor, steps: int) -> fm.MAML:
    return fm.CAVIA(network(features=6), loss, lr, steps, context=2)


ALGORITHMS: dict[str, Made] = {
    "ANIL": fm.ANIL,
    "BOIL": fm.BOIL,
    "CAVIA": cavia,
    "FOMAML": fm.FOMAML,
    "IMAML": fm.IMAML,
    "MAML": fm.MAML,
    "MAMLPlusPlus": maml_plus_plus,
    "MetaCurvature": fm.MetaCurvature,
    "MetaSGD": meta_sgd,
    "ProtoMAML": fm.ProtoMAML,
    "Reptile": fm.Reptile,
}
LEARN_RATES = ALGORITHMS.keys() - {"IMAML", "Reptile"}
ADAPTS = {"MAML": None, "FOMAML": None, "ANIL": HEAD, "BOIL": BODY}  # what the oracle knows


def test_the_table_is_complete() -> None:
    assert set(ALGORITHMS) == {name for name in fm.algorithms.__all__ if name != "MetaOutput"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_other_numbers_of_steps(name: str) -> None:
    tasks = labelled()
    rates = RATES.clone().requires_grad_(name in LEARN_RATES)
    learner = ALGORITHMS[name](network(), F.cross_entropy, rates, TRAINED)
    each = torch.cat([RATES, RATES[-1:].expand(MORE - TRAINED)])
    for steps in (MORE, 1):
        loss, found = learner.value_and_grad(tasks, steps=steps)
        with torch.no_grad():
            out = learner(tasks, steps=steps)
        adapted = learner.adapt(tasks, steps=steps)
        assert out.support_losses.shape == adapted.support_losses.shape == (steps, len(tasks))
        assert relative_error(out.loss, loss) <= EXACT
        assert relative_error(adapted(tasks.query[0]), out.logits) <= EXACT
        if steps == MORE:  # as one that is trained with so many
            rule, learner.steps = learner if learner.inner is None else learner.inner, MORE
            kept = rule.lr
            if name == "MAMLPlusPlus":
                rule.lr = nn.Parameter(each.unsqueeze(1).repeat(1, kept.shape[1]))
            elif name != "MetaSGD":
                rule.lr = each.requires_grad_(rates.requires_grad)
            wanted_loss, wanted = learner.value_and_grad(tasks)
            rule.lr, learner.steps = kept, TRAINED
            for rate in found.keys() & {"lr", "inner.lr"}:
                own = torch.zeros_like(found[rate])
                wanted[rate] = own.index_add(0, torch.arange(MORE).clamp(max=TRAINED - 1), wanted[rate])
            assert relative_error(loss, wanted_loss) <= EXACT
            assert relative_error(found, wanted) <= EXACT
        if name in ADAPTS:
            lr, first_order = each.detach(), name == "FOMAML"
            model, both = network(), (tasks.support, tasks.query)
            truth = maml_loop(model, F.cross_entropy, *both, lr, steps, first_order, ADAPTS[name])
            assert relative_error(out.logits, truth[2]) <= EXACT
            assert relative_error({n: found[n] for n in truth[3]}, truth[3]) <= EXACT

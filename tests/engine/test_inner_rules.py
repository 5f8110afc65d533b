"""Momentum, Nesterov and weight decay in the inner loop, against autograd of an explicit one."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.inner.rates import RateTable
from tests.engine.test_factored import Largest, plans
from tests.engine.test_inner_rates import SHAPES, learned, rates_of
from tests.engine.test_native import batch_of, network
from tests.oracle import maml_loop, relative_error, total_error

EXACT = 1e-11  # float64 rounding of a few thousand operations; a wrong term shows above 1e-3

RULES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.2},
    "all": {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov decay": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
}


def tensors(rule: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every number of a rule as a tensor that is learned."""
    return {n: v if v is True else torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in rule.items()}


def network_and_tasks(*widths: int) -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    return network(*widths, activation="tanh"), batch_of(widths[0], widths[-1], "cross entropy", tasks=3)


@functools.cache  # to trace a network takes longer than all the rest
def learner(*widths: int) -> tuple[nn.Module, fm.TaskBatch, fm.MAML]:
    model, tasks = network_and_tasks(*widths)
    return model, tasks, fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1), executor="reference")


def truth(model: nn.Module, tasks: fm.TaskBatch, lr: Any, steps: int, first_order: bool, rule: dict[str, Any]):
    loop = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, steps, first_order, **rule)
    names = dict(model.named_parameters())
    return {n if n in names else f"inner.{n}": d for n, d in loop[3].items()}


@pytest.mark.parametrize("plan", ["dense", "factored", "mixed"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_exact(name: str, plan: str) -> None:
    """Fixed and learned, of first and second order, in chunks and not, by the program."""
    model, tasks, maml = learner(4, 5, 3)
    maml.plan = (("0.weight", "factored"), ("2.weight", "dense")) if plan == "mixed" else plan
    rate = torch.tensor([0.1, 0.2, 0.15, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    fixed, of_tensors = RULES[name], tensors(RULES[name])
    cases = [(fixed, 0.1, 5, False), (of_tensors, rate, 5, False), (of_tensors, rate, 1, False), (fixed, 0.1, 2, True)]
    for rule, lr, steps, maml.first_order in [*cases, (of_tensors, rate, 3, True), (of_tensors, rate, 0, False)]:
        maml.inner = fm.inner.SGD(lr, **rule)
        wanted = truth(model, tasks, lr, steps, maml.first_order, rule)
        for maml.chunk_size in (None, 2):
            assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], wanted) <= EXACT


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    widths=st.sampled_from([(4, 5, 3), (1, 3, 1), (3, 1, 2)]),
    name=st.sampled_from([*RULES]),
    wanted=st.sets(st.sampled_from(["lr", "momentum", "dampening", "weight_decay"])),
    kinds=st.tuples(*[st.sampled_from([*SHAPES])] * 2),
    plan=st.sampled_from(["dense", "factored"]),
    steps=st.integers(1, 4),
    first_order=st.booleans(),
)
def test_rules_beside_rates_of_any_shape(
    widths: tuple[int, ...],
    name: str,
    wanted: set[str],
    kinds: tuple[str, str],
    plan: str,
    steps: int,
    first_order: bool,
) -> None:
    model, tasks, maml = learner(*widths)
    rule = {n: v if n in wanted else RULES[name][n] for n, v in tensors(RULES[name]).items()}
    lr = rates_of(model, dict(zip(("0.weight", "2.weight"), kinds, strict=True)))
    lr = lr if "lr" in wanted else {n: rate.detach() for n, rate in lr.items()}
    maml.inner, maml.plan, maml.first_order = fm.inner.SGD(lr, **rule), plan, first_order
    found = maml.value_and_grad(tasks, steps=steps)[1]
    assert relative_error(found, truth(model, tasks, lr, steps, first_order, rule)) <= EXACT

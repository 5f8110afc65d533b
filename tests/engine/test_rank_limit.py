"""Weights that are factors until their rank is too large, and each task's own from that step on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.low_rank import Factor, LowRank, Own, rank_limit
from fastmeta.engine import fast_weights
from tests.engine.test_native import EXACT, batch_of, network, truth
from tests.oracle import relative_error

pytestmark = pytest.mark.usefixtures("traced_once")
WIDTH = 12  # a matrix of so many rows and columns is as large as factors of rank 6
TIGHT = {"executor": "reference", "memory_budget": 1}  # makes factors of whatever is smaller so


def forms(monkeypatch: pytest.MonkeyPatch) -> list[list[bool]]:
    """For each step that a meta-step takes, which of the factored weights it leaves formed."""
    seen: list[list[bool]] = []
    descend = fast_weights.FastWeights.descend

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = descend(*args, **kwargs)
        seen.append([w.own is not None for w in result.factors.values()])
        return result

    monkeypatch.setattr(fast_weights.FastWeights, "descend", watched)
    return seen


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
@pytest.mark.parametrize(("support", "query"), [(2, 6), (2, 7), (3, 3), (5, 2)])
def test_the_gradient_is_exact_on_both_sides_of_the_switch(
    support: int, query: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rank_limit(WIDTH, WIDTH) == 6
    model = network(WIDTH, WIDTH, WIDTH, 3, activation="tanh")
    tasks = batch_of(WIDTH, 3, "cross entropy", (support, query))
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=5, **TIGHT)
    first, second, *_ = (row for row in maml.explain(tasks).rows if row.op == "linear")
    assert (first.plan, second.plan) == ("factored", "factored")
    assert "formed" not in first.reason
    assert second.reason.endswith(f"formed after {6 // support + 1} steps")
    seen = forms(monkeypatch)
    _, found = maml.value_and_grad(tasks)
    assert relative_error(found, truth(model, F.cross_entropy, tasks, 0.1, 5)[3]) <= EXACT
    # factors of five steps, of which each adds `support`, the first layer's all on the same rows
    assert [own for _, own, *_ in seen[:5]] == [support * (k + 1) > 6 for k in range(5)]
    assert not any(first for first, *_ in seen[:5])


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
@pytest.mark.parametrize("kind", ["scalar", "by step", "by name", "by row", "by column"])
def test_learned_rates_get_their_gradient(kind: str) -> None:
    model = network(WIDTH, WIDTH, WIDTH, 3, activation="tanh")
    tasks = batch_of(WIDTH, 3, "cross entropy", (2, 7))

    def rate(*shape: int) -> nn.Parameter:
        return nn.Parameter(0.02 + 0.1 * torch.rand(shape, dtype=torch.float64))

    shapes = {"by name": lambda p: (), "by row": lambda p: (p.shape[0], 1), "by column": lambda p: (1, p.shape[1])}
    lr: Any = rate() if kind == "scalar" else rate(5)
    if kind in shapes:
        lr = {name: rate(*shapes[kind](p)) if p.dim() == 2 else rate() for name, p in model.named_parameters()}
    found = fm.MAML(model, F.cross_entropy, lr=lr, steps=5, **TIGHT).value_and_grad(tasks)[1]
    wanted = fm.MAML(model, F.cross_entropy, lr=lr, steps=5, engine="autodiff").value_and_grad(tasks)[1]
    assert relative_error(found, wanted) <= EXACT


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
@settings(max_examples=8, deadline=None)
@given(
    widths=st.tuples(st.integers(3, 14), st.integers(3, 14)),
    sets=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    steps=st.integers(0, 5),
    first_order=st.booleans(),
)
def test_random_networks(widths: tuple[int, int], sets: tuple[int, int], steps: int, first_order: bool) -> None:
    model = network(6, *widths, 3, activation="tanh")
    tasks = batch_of(6, 3, "cross entropy", sets)
    options: dict[str, Any] = {"lr": 0.1, "steps": steps, "first_order": first_order}
    found = fm.MAML(model, F.cross_entropy, **options, **TIGHT).value_and_grad(tasks)[1]
    wanted = fm.MAML(model, F.cross_entropy, engine="autodiff", **options).value_and_grad(tasks)[1]
    assert relative_error(found, wanted) <= EXACT


def test_a_plan_that_is_asked_for_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(WIDTH, WIDTH, WIDTH, 3, activation="tanh")
    tasks = batch_of(WIDTH, 3, "cross entropy", (3, 7))
    seen = forms(monkeypatch)
    fm.MAML(model, F.cross_entropy, lr=0.1, steps=5, plan="factored").value_and_grad(tasks)
    assert not any(any(own) for own in seen)


def pair(rank: int, scale: Any = 1.0) -> Factor:
    return Factor(torch.randn(3, rank, 7), torch.randn(3, rank, 5), scale)


SCALES = [0.5, torch.tensor(0.3), torch.rand(7, 1), torch.rand(1, 5)]


@pytest.mark.parametrize("scale", SCALES, ids=["number", "scalar", "row", "column"])
def test_factors_beyond_the_limit_are_added_up(scale: Any) -> None:
    shared, x, d = torch.randn(7, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 7)
    within = LowRank(shared, (pair(2),), limit=4)
    assert within.plus(LowRank(None, (pair(2),))).own is None
    more = LowRank(None, (pair(3),))
    beyond = within.plus(more)
    assert beyond.own is not None
    assert beyond.shared is None
    assert beyond.factors == ()
    formed = within.formed() + more.formed()
    torch.testing.assert_close(beyond.formed(), formed)
    scaled = beyond.times(scale)
    assert scaled.own is not None
    assert scaled.own.matrix is beyond.own.matrix  # not copied
    torch.testing.assert_close(scaled.of_rows(x), torch.bmm(x, (formed * scale).mT))
    torch.testing.assert_close(scaled.of_cotangents(d), torch.bmm(d, formed * scale))
    torch.testing.assert_close(scaled.over_tasks(), (formed * scale).sum(0))
    torch.testing.assert_close(scaled.plus(more, scale).formed(), (formed + more.formed()) * scale)
    torch.testing.assert_close(more.plus(beyond, scale).formed(), more.formed() + formed * scale)
    torch.testing.assert_close(beyond.formed(), formed)  # and nothing was overwritten
    shapes = [(), tuple(scale.shape)] if isinstance(scale, Tensor) else [()]
    for shape in shapes:
        for one, two in ((scaled, more), (more, beyond), (within, beyond), (beyond, scaled)):
            found = one.inner(two, shape)
            assert found is not None
            torch.testing.assert_close(found, (one.formed() * two.formed()).sum(0).sum_to_size(shape))
    assert LowRank(None).inner(beyond) is None
    assert beyond.inner(LowRank(None)) is None


def test_what_is_formed_is_overwritten_where_that_is_asked_for() -> None:
    one, two = (
        LowRank(None, own=Own(torch.randn(3, 7, 5)), limit=2),
        LowRank(None, (pair(2, 0.5), pair(1, torch.tensor(2.0)))),
    )
    wanted = one.formed() - two.formed()
    again = one.minus_(two)
    assert again is one
    torch.testing.assert_close(again.formed(), wanted)
    torch.testing.assert_close(again.minus_(LowRank(None, own=Own(wanted, 0.5))).formed(), 0.5 * wanted)
    factors = LowRank(None, (pair(2),), limit=2)
    less = factors.minus_(two)
    torch.testing.assert_close(less.formed(), factors.formed() - two.formed())
    assert less.own is not None

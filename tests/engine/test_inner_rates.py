"""Inner rates of rows, columns and elements: the gradient to each is exact, whether its weight is formed or factors."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.inner.rates import RateTable
from tests.engine.test_factored import EXACT, Largest, planned, plans, tokens
from tests.engine.test_native import batch_of, network
from tests.oracle import maml_loop, relative_error

pytestmark = pytest.mark.usefixtures("traced_once")
SHAPES = {
    "one": lambda shape: (),
    "row": lambda shape: (shape[0], *[1] * (len(shape) - 1)),
    "column": lambda shape: shape[1:],
    "element": lambda shape: shape,
}


def learned(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.05 + 0.2 * torch.rand(SHAPES[kind](shape), dtype=dtype)).requires_grad_()


def rates_of(model: nn.Module, kinds: dict[str, str], others: str = "element") -> dict[str, Tensor]:
    """Learned rates: of these kinds for the weights named, and of one kind for all other parameters."""
    return {n: learned(tuple(p.shape), kinds.get(n, others), p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["row", "column"])
def test_rates_of_rows_and_columns_keep_factors(kind: str) -> None:
    model, tasks = tokens()
    plan = planned(model, set)
    lr = rates_of(model, dict.fromkeys(plan, kind))
    maml = fm.MAML(model, F.cross_entropy, lr=lr, plan=plan)
    assert plans(maml, tasks) == ["factored"] * 3
    for maml.first_order, steps in ((False, 0), (False, 1), (False, 3), (True, 2)):
        truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, steps, maml.first_order)[3]
        for maml.chunk_size in (None, 3):
            assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], truth) <= EXACT


@pytest.mark.parametrize(
    ("kinds", "others"),
    [
        (("row", "element"), "one"),
        (("element", "column"), "element"),
        (("one", "one"), "element"),
        (("column", "row"), "one"),
    ],
)
def test_only_weights_with_a_rate_an_element_are_formed(kinds: tuple[str, str], others: str) -> None:
    torch.manual_seed(0)
    model, tasks = network(5, 6, 3, activation="tanh"), batch_of(5, 3, "cross entropy")
    lr = rates_of(model, dict(zip(("0.weight", "2.weight"), kinds, strict=True)), others)
    maml = fm.MAML(model, F.cross_entropy, lr, 2, plan="factored")
    rows = [row for row in maml.explain(tasks).rows if row.op == "linear"]
    assert [row.plan for row in rows] == ["dense" if kind == "element" else "factored" for kind in kinds]
    assert [row.reason.startswith("one rate an element") for row in rows] == [kind == "element" for kind in kinds]
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, 2)[3]
    for maml.plan in ("factored", "dense"):
        assert relative_error(maml.value_and_grad(tasks)[1], truth) <= EXACT
    if "element" in kinds:
        maml.plan = (("0.weight", "factored"), ("2.weight", "factored"))
        with pytest.raises(ValueError, match=r"one a row or a column, .*; got \['.*'\], possible: \['.*'\]"):
            maml.value_and_grad(tasks)


def test_autograd_sees_the_rates_own_shapes() -> None:
    torch.manual_seed(0)
    model, tasks = network(5, 6, 3, activation="tanh"), batch_of(5, 3, "cross entropy")
    rates = rates_of(model, {"0.weight": "row", "2.weight": "row"})
    lr = {n: nn.Parameter(rate.detach()) for n, rate in rates.items()}
    maml = fm.MAML(model, F.cross_entropy, lr=lr, steps=2, plan="factored")
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, 2)[3]
    maml(tasks).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()} | {f"lr.{n}": rate.grad for n, rate in lr.items()}
    assert relative_error(found, truth) <= EXACT
    autodiff = fm.MAML(model, F.cross_entropy, lr=lr, steps=2, engine="autodiff")
    assert relative_error(autodiff.value_and_grad(tasks)[1], truth) <= EXACT
    assert relative_error(maml.adapt(tasks).parameters, autodiff.adapt(tasks).parameters) <= EXACT


def test_a_change_of_the_rates_shapes_is_noticed() -> None:
    """Tables with as many rates in all, of other shapes."""
    torch.manual_seed(0)
    model, tasks = network(4, 4, 3, activation="tanh", bias=False), batch_of(4, 3, "cross entropy")
    rate = torch.rand(4, dtype=torch.float64) * 0.2
    tables = [{"0.weight": value, "2.weight": 0.1} for value in (rate, rate[:, None])]
    maml = fm.MAML(model, F.cross_entropy, lr=tables[0], steps=2)
    for table in tables * 2:
        maml.lr = fm.MAML(model, F.cross_entropy, lr=table).lr
        truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, table, 2)[3]
        assert relative_error(maml.value_and_grad(tasks)[1], truth) <= EXACT


def test_native_executors_say_why_they_do_not_run() -> None:
    model, tasks = network(5, 3), batch_of(5, 3, "cross entropy")
    lr = rates_of(model, {})
    assert "inner rates differ within a parameter" in fm.MAML(model, F.cross_entropy, lr=lr).explain(tasks).executor
    with pytest.raises(RuntimeError, match="inner rates differ within a parameter"):
        fm.MAML(model, F.cross_entropy, lr=lr, executor="native").value_and_grad(tasks)


def test_wide_layers_form_no_weight_of_a_task() -> None:
    torch.manual_seed(0)
    width = 300
    model = network(width, width, width, 5, dtype=torch.float32)
    tasks = batch_of(width, 5, "cross entropy", (3, 4), tasks=6, dtype=torch.float32)
    lr = rates_of(model, {"0.weight": "row", "2.weight": "column", "4.weight": "one"}, "one")
    maml = fm.MAML(model, F.cross_entropy, lr=lr, steps=2)
    assert plans(maml, tasks)[:2] == ["factored", "factored"]
    with Largest() as largest:
        found = maml.value_and_grad(tasks)[1]
    assert largest.elements < 2 * width * width
    double = {n: rate.detach().double().requires_grad_() for n, rate in lr.items()}
    sets = [(x.double(), y) for x, y in (tasks.support, tasks.query)]
    truth = maml_loop(model.double(), F.cross_entropy, *sets, double, 2)[3]
    assert relative_error(found, truth) <= 1e-4  # float32 rounding of sums of a few hundred terms, two steps deep


@functools.cache  # to trace a network takes longer than all the rest
def learner(*widths: int) -> tuple[nn.Module, fm.TaskBatch, fm.MAML]:
    torch.manual_seed(0)
    model, tasks = network(*widths, activation="tanh"), batch_of(widths[0], widths[-1], "cross entropy", tasks=2)
    return model, tasks, fm.MAML(model, F.cross_entropy, rates_of(model, {}), executor="reference")


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
    widths=st.sampled_from([(3, 4, 2), (2, 1, 3)]),
    kinds=st.tuples(*[st.sampled_from([*SHAPES])] * 2),
    plan=st.sampled_from(["dense", "factored"]),
    steps=st.integers(1, 3),
)
def test_rates_of_any_shape(widths: tuple[int, ...], kinds: tuple[str, str], plan: str, steps: int) -> None:
    model, tasks, maml = learner(*widths)
    lr = rates_of(model, dict(zip(("0.weight", "2.weight"), kinds, strict=True)))
    maml.lr, maml.plan = RateTable(lr), plan
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, steps)[3]
    assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], truth) <= EXACT

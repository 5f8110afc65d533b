"""Embedding tables of which each task takes the rows its data name: the same gradient as tables that are formed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core.live_bytes import LiveBytes
from fastmeta.core.touched_rows import add_rows, numbered
from tests.engine.test_factored import Largest
from tests.oracle import relative_error

EXACT, SINGLE = 1e-9, 1e-4
WAYS, LENGTH = 3, 4
ROWS = {"table.weight": "factored", "*": "dense"}


class Words(nn.Module):
    """Embedded words and a head; smooth, so that rounding flips nothing."""

    def __init__(self, size: int = 40, width: int = 5, padding: int | None = None, length: int = LENGTH) -> None:
        super().__init__()
        self.table = nn.Embedding(size, width, padding_idx=padding)
        self.head = nn.Linear(length * width, WAYS)

    def embedded(self, ids: Tensor) -> Tensor:
        return self.table(ids)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedded(ids)).flatten(1))


class Tied(Words):
    """The table is read as a matrix, too."""

    def embedded(self, ids: Tensor) -> Tensor:
        return self.table(ids) + F.linear(self.table(ids), self.table.weight).mean(-1, keepdim=True)


class Twice(Words):
    """Two lookups, of different words, with a padding in one of them; and positions, which are no data."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(6, 5)
        self.register_buffer("places", torch.arange(6))

    def embedded(self, ids: Tensor) -> Tensor:
        shifted = F.embedding((ids + 1) % 40, self.table.weight, padding_idx=7)
        return self.table(ids) * shifted + self.position(self.places[: ids.shape[1]])


class Chosen(Words):
    """The words are chosen by what adapts."""

    def embedded(self, ids: Tensor) -> Tensor:
        return self.table((self.head.weight.sum() > 1e9).long() + ids)


def words(
    size: int = 40, length: int = LENGTH, samples: tuple[int, int] = (3, 5), tasks: int = 4, seed: int = 0
) -> fm.TaskBatch:
    torch.manual_seed(seed)
    return fm.TaskBatch(*((torch.randint(size, (tasks, n, length)), torch.randint(WAYS, (tasks, n))) for n in samples))


def model(kind: Callable[..., nn.Module] = Words, *args: Any, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return kind(*args, **options).double()


def truth(net: nn.Module, tasks: fm.TaskBatch, **options: Any) -> dict[str, Tensor]:
    return fm.MAML(net, F.cross_entropy, engine="autodiff", **options).value_and_grad(tasks)[1]


def plans(maml: fm.MAML, tasks: fm.TaskBatch) -> list[str]:
    return [row.plan for row in maml.explain(tasks).rows if row.op == "embedding"]


@pytest.mark.parametrize("parameters", [None, ["head.*"]])
def test_the_gradient_is_exact(parameters: Any) -> None:
    net, tasks = model(padding=3), words()
    rows = fm.MAML(net, F.cross_entropy, 0.3, parameters=parameters, plan=ROWS)
    wanted = fm.MAML(net, F.cross_entropy, 0.3, parameters=parameters, engine="autodiff")
    assert plans(rows, tasks) == ["factored"]
    for first_order in (False, True):
        rows.first_order = wanted.first_order = first_order
        for steps in (0, 1, 3):
            exact = wanted.value_and_grad(tasks, steps=steps)[1]
            for chunk_size in (None, 1):
                rows.chunk_size = chunk_size
                assert relative_error(rows.value_and_grad(tasks, steps=steps)[1], exact) <= EXACT


@settings(max_examples=6, deadline=None)
@given(
    size=st.integers(1, 30),
    width=st.integers(1, 5),
    length=st.integers(1, 6),
    samples=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tasks=st.integers(1, 4),
    padded=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_vocabularies_shapes_repeated_words_and_paddings(
    size: int,
    width: int,
    length: int,
    samples: tuple[int, int],
    tasks: int,
    padded: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    net = model(Words, size, width, seed % size if padded else None, length)
    batch = words(size, length, samples, tasks, seed)
    maml = fm.MAML(copy.deepcopy(net).to(dtype), F.cross_entropy, 0.2, 2, plan=ROWS)
    bound = EXACT if dtype == torch.float64 else SINGLE
    assert relative_error(maml.value_and_grad(batch)[1], truth(net, batch, lr=0.2, steps=2)) <= bound


def by_step(net: nn.Module) -> Any:
    return nn.Parameter(torch.tensor([0.1, 0.02, 0.2], dtype=torch.float64))


def by_name(net: nn.Module) -> Any:
    return {n: nn.Parameter(torch.rand((), dtype=torch.float64) * 0.2) for n, _ in net.named_parameters()}


def by_column(net: nn.Module) -> Any:
    shapes = {n: (1, p.shape[1]) if p.dim() == 2 else () for n, p in net.named_parameters()}
    return {n: nn.Parameter(torch.rand(shape, dtype=torch.float64) * 0.2) for n, shape in shapes.items()}


def by_element(net: nn.Module) -> Any:
    return {n: nn.Parameter(torch.rand_like(p) * 0.2) for n, p in net.named_parameters()}


@pytest.mark.parametrize("rates", [by_step, by_name, by_column])
def test_rates_of_any_kind_get_their_gradient(rates: Callable[[nn.Module], Any]) -> None:
    net, tasks = model(), words()
    lr = rates(net)
    maml = fm.MAML(net, F.cross_entropy, lr, 3, plan=ROWS, chunk_size=3)
    assert plans(maml, tasks) == ["factored"]
    assert relative_error(maml.value_and_grad(tasks)[1], truth(net, tasks, lr=lr, steps=3)) <= EXACT


def test_rows_with_rates_of_their_own_are_formed_with_the_others() -> None:
    net, tasks = model(), words()
    lr = by_element(net)
    maml = fm.MAML(net, F.cross_entropy, lr, 3, plan="factored")
    row = next(row for row in maml.explain(tasks).rows if row.op == "embedding")
    assert (row.plan, row.reason) == ("dense", "its rows have rates of their own, so its table is formed")
    assert relative_error(maml.value_and_grad(tasks)[1], truth(net, tasks, lr=lr, steps=3)) <= EXACT


@pytest.mark.parametrize("steps", [1, 3])
def test_rules_with_a_state_do_to_rows_what_they_do_to_tables(steps: int) -> None:
    net, tasks = model(padding=3), words()
    inner = fm.inner.SGD(0.2, momentum=torch.tensor(0.7, requires_grad=True), nesterov=True, weight_decay=0.1)
    maml = fm.MAML(net, F.cross_entropy, inner=inner, steps=steps, plan=ROWS)
    assert plans(maml, tasks) == ["factored"]
    assert relative_error(maml.value_and_grad(tasks)[1], truth(net, tasks, inner=inner, steps=steps)) <= EXACT


def test_several_lookups_and_indices_that_are_computed() -> None:
    net, tasks = model(Twice), words()
    every = {"table.weight": "factored", "position.weight": "factored"}
    for parameters in (None, ["position.*", "head.*"]):
        options: dict[str, Any] = {"lr": 0.3, "steps": 2, "parameters": parameters}
        maml = fm.MAML(net, F.cross_entropy, plan=every, **options)
        assert plans(maml, tasks) == ["factored"] * 3
        assert relative_error(maml.value_and_grad(tasks)[1], truth(net, tasks, **options)) <= EXACT


@pytest.mark.parametrize(("kind", "reason"), [(Tied, "other calls read its table"), (Chosen, "more than the tasks'")])
def test_a_table_that_must_be_formed_says_why(kind: Any, reason: str) -> None:
    net, tasks = model(kind), words()
    rows = fm.MAML(net, F.cross_entropy, plan="factored").explain(tasks).rows
    lookups = [row for row in rows if row.op == "embedding"]
    assert all(row.plan == "dense" and reason in row.reason and row.dense_bytes is None for row in lookups)
    with pytest.raises(ValueError, match="for tables that embeddings alone read, with one rate"):
        fm.MAML(net, F.cross_entropy, plan=ROWS).value_and_grad(tasks)


def test_the_plan_goes_by_cost_and_may_be_told_otherwise() -> None:
    for size, chosen in ((12, "dense"), (20_000, "factored")):
        net, tasks = model(Words, size, 16).float(), words(size)
        maml = fm.MAML(net, F.cross_entropy, 0.1, 2, executor="reference")
        for plan, found in (("auto", chosen), ("dense", "dense"), ("factored", "factored")):
            maml.plan = plan
            assert plans(maml, tasks) == [found]
        row = next(row for row in maml.explain(tasks).rows if row.op == "embedding")
        assert row.dense_bytes == 4 * 4 * size * 16
        assert row.factored_bytes == 4 * 4 * min(size, 4 * (3 + 5)) * 16
        assert "shares the others" in row.reason


def test_the_native_executor_is_left_where_rows_take_less_time(extension: object) -> None:
    net, tasks = model(Words, 50_000, 32).float(), words(50_000)
    maml = fm.MAML(net, F.cross_entropy, 0.1, 2)
    assert "rows of embedding tables take less time than a table of each task's own" in maml.explain(tasks).executor
    small = fm.MAML(model(Words, 12), F.cross_entropy, 0.1, 2).explain(words(12))
    assert small.executor.startswith("native")
    with pytest.raises(RuntimeError, match="asked for"):
        fm.MAML(net, F.cross_entropy, plan="factored", executor="native").value_and_grad(tasks)


@pytest.mark.parametrize("parameters", [None, ["head.*"]])
def test_no_task_forms_a_table(parameters: Any) -> None:
    size, width = 30_000, 8
    net, tasks = model(Words, size, width).float(), words(size)
    maml = fm.MAML(net, F.cross_entropy, 0.1, 3, parameters=parameters, executor="reference", plan=ROWS)
    maml.value_and_grad(tasks)
    with Largest() as largest, LiveBytes() as live:
        maml.value_and_grad(tasks)
    assert largest.elements == size * width  # the meta-gradient alone
    assert live.peak <= 1.1 * 4 * size * width


def test_a_memory_budget_is_kept_on_rows() -> None:
    net, tasks = model(), words()
    options: dict[str, Any] = {"lr": 0.3, "steps": 3}
    maml = fm.MAML(net, F.cross_entropy, plan=ROWS, memory_budget=1, **options)
    with pytest.warns(UserWarning, match="memory_budget"):
        found = maml.value_and_grad(tasks)[1]
    assert maml.explain(tasks).recomputes
    assert relative_error(found, truth(net, tasks, **options)) <= EXACT


def test_a_budget_too_small_for_a_table_takes_rows(extension: object) -> None:
    net, tasks = model(Words, 2000, 32), words(2000)
    budget = 1 << 20
    free = fm.MAML(net, F.cross_entropy, 0.1, 4, executor="native")
    assert free.explain(tasks).peak > budget
    told = fm.MAML(net, F.cross_entropy, 0.1, 4, memory_budget=budget).explain(tasks)
    assert told.executor.startswith("reference")
    assert told.peak <= budget


def test_other_objectives_evaluation_and_adapted_models() -> None:
    net, tasks = model(), words()
    gradients, losses, tables = [], [], []
    for options in ({"plan": ROWS}, {"engine": "autodiff"}):
        maml = fm.MAML(net, F.cross_entropy, 0.3, 2, **options)
        out = maml(tasks)
        found = torch.autograd.grad(out.task_losses[1] + out.logits.square().mean(), net.parameters())
        gradients.append(dict(zip(dict(net.named_parameters()), found, strict=True)))
        with torch.no_grad():
            losses.append(maml(tasks).task_losses)
        adapted = maml.adapt(tasks)
        tables.append(adapted.parameters["table.weight"])
    assert relative_error(*gradients) <= EXACT
    assert relative_error(*losses) <= EXACT
    assert tables[0].shape == (4, 40, 5)
    assert relative_error(*tables) <= EXACT


def test_an_index_outside_the_table_is_an_error() -> None:
    maml, tasks = fm.MAML(model(), F.cross_entropy, plan=ROWS), words()
    for wrong in (-1, 40):
        tasks.query[0][2, 1, 0] = wrong
        with pytest.raises(IndexError, match=rf"indices must be in \[0, 40\), got {wrong}; check the tokenizer"):
            maml.value_and_grad(tasks)


def test_numbers_of_touched_rows() -> None:
    indices = torch.tensor([[5, 2, 5, 9], [9, 9, 9, 9]])
    numbers, touched = numbered(indices, 10)
    assert numbers.tolist() == [[1, 0, 1, 2], [0, 0, 0, 0]]
    assert touched.tolist() == [[2, 5, 9, 0], [9, 0, 0, 0]]
    numbers, touched = numbered(indices, 10, apart=(3, 9))
    assert numbers.tolist() == [[1, 0, 1, 5], [5, 5, 5, 5]]
    assert touched[:, 4:].tolist() == [[3, 9], [3, 9]]
    numbers, touched = numbered(torch.tensor([[1, 0, 1]]), 2)
    assert (numbers.tolist(), touched.tolist()) == ([[1, 0, 1]], [[0, 1]])


def test_rows_add_up_in_one_order() -> None:
    torch.manual_seed(0)
    touched, rows = torch.randint(5, (300, 4)), torch.randn(300, 4, 3)
    total = add_rows(torch.zeros(5, 3), touched, rows)
    formed = torch.zeros(5, 3, dtype=torch.float64).index_add(0, touched.flatten(), rows.double().flatten(0, 1))
    torch.testing.assert_close(total, formed.float(), atol=1e-4, rtol=0)  # some 240 terms of order 1
    assert torch.equal(total, add_rows(torch.zeros(5, 3), touched, rows))

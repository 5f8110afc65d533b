"""Tables of embeddings and large weights on the native executor: one copy of what a task need not have of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native as extension
from tests.engine.test_native import EXACT, batch_of, network, truth
from tests.oracle import relative_error
from tests.process_memory import in_a_process, needs_a_mark

pytestmark = [
    pytest.mark.skipif(extension.extension() is None, reason="no extension"),
    pytest.mark.usefixtures("traced_once"),
]
WAYS = 3


class Words(nn.Module):
    """A table before the first layer, and one behind it."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(rows, features, padding_idx=2), nn.Embedding(rows, 5)
        self.body, self.head = nn.Linear(features, 5), nn.Linear(5, WAYS)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.first(words))) + self.second(words))


def words(rows: int, features: int, dtype: torch.dtype = torch.float64) -> Words:
    torch.manual_seed(0)
    return Words(rows, features).to(dtype)


def sentences(rows: int, tasks: int, sizes: tuple[int, int] = (4, 6)) -> fm.TaskBatch:
    """Few numbers: they repeat within a set, and support and query share some; the padding is one of them."""
    torch.manual_seed(1)
    used = torch.cat([torch.tensor([2]), torch.randperm(rows)[:4]])
    return fm.TaskBatch(*((used[torch.randint(5, (tasks, n))], torch.randint(WAYS, (tasks, n))) for n in sizes))


def both(model: nn.Module, **options: Any) -> list[Any]:
    return [fm.MAML(model, F.cross_entropy, executor=name, **options) for name in ("native", "reference")]


def apart(maml: fm.MAML, tasks: fm.TaskBatch) -> list[bool]:
    step = maml.prepare(tasks)[1].native
    return [o["apart"] for o in step._programs[0]["operations"] if o["operation"] == "embedding"]


ADAPTED: dict[str, tuple[list[str] | None, list[bool]]] = {  # and whether the gradients of the tables are kept apart
    "all": (None, [False, False]),
    "linear": (["body.*", "head.*"], [True, True]),
    "head": (["head.*"], [True, True]),
    "a table": (["second.*", "head.*"], [True, False]),
}


@pytest.mark.parametrize(
    ("adapted", "steps", "first_order", "features", "tasks"),
    [
        ("all", 3, False, 7, 5),
        ("all", 2, True, 16, 1),
        ("linear", 3, False, 7, 5),
        ("linear", 1, False, 16, 1),
        ("linear", 2, True, 7, 5),
        ("head", 0, False, 7, 3),
        ("head", 2, False, 16, 1),
        ("a table", 3, False, 7, 5),
    ],
)
def test_tables_have_the_exact_gradient(adapted: str, steps: int, first_order: bool, features: int, tasks: int) -> None:
    rows = 30
    parameters, kept = ADAPTED[adapted]
    model, batch = words(rows, features), sentences(rows, tasks)
    ours, reference = both(model, lr=0.3, steps=steps, first_order=first_order, parameters=parameters)
    assert apart(ours, batch) == kept
    for _ in range(2):  # a workspace that is used again, and other weights in it
        value, found = ours.value_and_grad(batch)
        right, wanted = reference.value_and_grad(batch)
        assert float(value) == pytest.approx(float(right), rel=1e-12)
        assert relative_error(found, wanted) <= EXACT
        assert not found["first.weight"][2].any()  # padding
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize("rates", ["learned", "by name", "learned by step"])
def test_tables_beside_rates_of_their_own(rates: str) -> None:
    model, batch = words(40, 7), sentences(40, 3)
    names = [f"{layer}.{kind}" for layer in ("body", "head") for kind in ("weight", "bias")]
    results = []
    for name in ("native", "reference"):
        made: Any = {
            "learned": lambda: nn.Parameter(torch.tensor(0.3, dtype=torch.float64)),
            "by name": lambda: {parameter: 0.1 * (i + 1) for i, parameter in enumerate(names)},
            "learned by step": lambda: nn.Parameter(torch.tensor([0.3, 0.1], dtype=torch.float64)),
        }[rates]()
        maml = fm.MAML(model, F.cross_entropy, made, 2, executor=name, parameters=["body.*", "head.*"])
        model.zero_grad()
        maml(batch).task_losses[1].backward()  # another objective than the mean
        gradients = {n: p.grad for n, p in model.named_parameters()}
        if isinstance(made, nn.Parameter):
            gradients["rates"] = made.grad
        results.append(gradients)
    assert relative_error(*results) <= EXACT


def test_a_table_that_a_task_reads_as_a_whole_is_summed_with_other_weights() -> None:
    model, batch = words(8, 7), sentences(8, 3)
    ours, reference = both(model, lr=0.3, steps=2, parameters=["body.*", "head.*"])
    assert apart(ours, batch) == [False, False]
    assert relative_error(ours.value_and_grad(batch)[1], reference.value_and_grad(batch)[1]) <= EXACT


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 6), nn.Linear(6, WAYS)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(numbers)) * self.table(39 - numbers))


def test_a_table_that_is_read_twice_is_exact_wherever_it_runs() -> None:
    torch.manual_seed(0)
    model, batch = Twice().double(), sentences(40, 3)
    found = fm.MAML(model, F.cross_entropy, 0.3, 2, parameters=["head.*"])
    wanted = fm.MAML(model, F.cross_entropy, 0.3, 2, parameters=["head.*"], engine="autodiff")
    assert relative_error(found.value_and_grad(batch)[1], wanted.value_and_grad(batch)[1]) <= EXACT


@pytest.mark.parametrize("tasks", [1, 5])
def test_tables_have_the_same_bits_with_any_number_of_threads(set_threads: Callable[[int], None], tasks: int) -> None:
    model, batch = words(40, 7, torch.float32), sentences(40, tasks)
    same_bits(
        fm.MAML(model, F.cross_entropy, 0.3, 2, executor="native", parameters=["body.*", "head.*"]), batch, set_threads
    )


@pytest.mark.parametrize(("width", "hidden"), [(30, 36000), (2400, 600)], ids=["formed", "collected"])
def test_large_weights_have_the_same_bits_with_any_number_of_threads(
    set_threads: Callable[[int], None], width: int, hidden: int
) -> None:
    model = network(width, hidden, 3, dtype=torch.float32)
    batch = batch_of(width, 3, "cross entropy", (2, 2), dtype=torch.float32)
    maml = fm.MAML(model, F.cross_entropy, 0.01, 1, executor="native")
    same_bits(maml, batch, set_threads)
    exact = fm.MAML(model.double(), F.cross_entropy, 0.01, 1, executor="reference")
    wanted = exact.value_and_grad(batch.to(dtype=torch.float64))[1]
    model.float()
    # float32: sums over `width` terms, twice
    assert relative_error(maml.value_and_grad(batch)[1], wanted) <= 4 * torch.finfo(torch.float32).eps * width**0.5


@pytest.mark.parametrize("rows", [(3, 2), (300, 420)], ids=["few rows", "rows beyond a panel's depth"])
def test_large_weights_of_several_blocks_are_exact(set_threads: Callable[[int], None], rows: tuple[int, int]) -> None:
    """More rows of the weight's gradient than a block, and a last strip that is not whole."""
    model, batch = network(7, 600, 250, 3, activation="tanh"), batch_of(7, 3, "cross entropy", rows, tasks=2)
    maml = fm.MAML(model, F.cross_entropy, 0.1, 2, executor="native", plan="dense")
    same_bits(maml, batch, set_threads)
    wanted = truth(model, F.cross_entropy, batch, 0.1, 2)[3]
    assert relative_error(maml.value_and_grad(batch)[1], wanted) <= EXACT


def same_bits(maml: fm.MAML, batch: fm.TaskBatch, set_threads: Callable[[int], None]) -> None:
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(maml.value_and_grad(batch)[1])
    for other in results[1:]:
        assert all(torch.equal(g, results[0][n]) for n, g in other.items())


def model_of_large_weights() -> tuple[fm.MAML, fm.TaskBatch, int]:
    """24 MiB of a table that does not adapt, 8 MiB of weights that do, 40 KiB of a pass."""
    torch.manual_seed(0)
    table = nn.Embedding(12288, 512)
    model = nn.Sequential(table, nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 3))
    batch = fm.TaskBatch(*((torch.randint(12288, (4, n)), torch.randint(3, (4, n))) for n in (5, 5)))
    maml = fm.MAML(model, F.cross_entropy, 0.01, 3, executor="native", parameters=["1.*", "3.*", "5.*"])
    return maml, batch, table.weight.numel() * 4


def test_no_task_holds_a_table_that_does_not_adapt() -> None:
    maml, batch, table = model_of_large_weights()
    work, programs = maml.prepare(batch)
    weights = 4 * sum(p.numel() for p in maml.model.parameters()) - table
    each = programs.native.workspace_bytes(work, learned=False)
    assert each - 3 * weights < 1 << 20  # those of each step, in the last of which the adjoint is taken
    others = programs.native._common_bytes(work, learned=False) - table - 3 * weights
    assert others < 1 << 20  # the gradient of all, and of the others the packed ones and their sum


RESIDENT = """
import json
import torch
from tests.engine.test_native_tables import fm, model_of_large_weights, sentences, words
from tests.process_memory import high_water, settle
torch.set_num_threads(2)
small = fm.MAML(words(40, 7), torch.nn.functional.cross_entropy, 0.1, 2, executor="native", parameters=["head.*"])
small.value_and_grad(sentences(40, 3))
maml, batch, _ = model_of_large_weights()
told = maml.explain(batch)
before = settle()
kept = maml.value_and_grad(batch)
print(json.dumps([told.peak, high_water() - before]))
"""


@needs_a_mark
def test_the_prediction_is_what_the_process_takes() -> None:
    predicted, measured = in_a_process(RESIDENT)
    assert abs(predicted / measured - 1) <= 0.15  # what the allocator and threads hold beside is not counted

"""A native program cut at operations without kernels: their own maps are called back, where that pays."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.core.task_op import Tensors
from fastmeta.engine.callback import Callbacks
from fastmeta.ops.activation.op import Activation
from fastmeta.ops.generic.op import GenericOp
from tests.engine.test_native import batch_of, both, truth
from tests.oracle import maml_loop, relative_error, total_error

pytestmark = [
    pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}"),
    pytest.mark.usefixtures("traced_once"),
]
EXACT = 1e-10  # float64 rounding through norms and three inner steps; a wrong term shows above 1e-3
WAYS = 3


class Excitation(nn.Module):
    """Scales channels by what their means say: a product of two values that broadcast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layer(x.mean((2, 3))))[:, :, None, None]


class Learned(nn.Module):
    """Powers of values, by an exponent that adapts; a mask that does not."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.linspace(1.5, 2.5, features))
        self.mask: Tensor
        self.register_buffer("mask", torch.linspace(0.5, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.pow(torch.sigmoid(x), self.power) * self.mask


class Tokens(nn.Module):
    """A task's data are numbers of rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, WAYS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)).mean(1))


def images(*blocks: Callable[[int], nn.Module]) -> nn.Module:
    """Two convolutional blocks of 6 channels on 10 x 10 images, each with a module of its own behind."""
    layers: list[nn.Module] = []
    for fan_in, block in zip((2, 6), blocks, strict=True):
        layers += [nn.Conv2d(fan_in, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False), block(6)]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, WAYS))


def image_batch(dtype: torch.dtype = torch.float64) -> fm.TaskBatch:
    torch.manual_seed(2)
    return fm.TaskBatch(
        *((torch.randn(3, n, 2, 10, 10, dtype=dtype), torch.randint(WAYS, (3, n))) for n in (4, 6)),
    )


def rows(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), *modules, nn.Linear(7, WAYS))


def smoothed(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y, label_smoothing=0.1)


def two_terms(x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(x, y) + 0.1 * x.square().mean()


ROWS = "cross entropy"
CASES: dict[str, tuple[nn.Module, Callable[..., Tensor], str]] = {
    "mish": (rows(nn.Mish()), F.cross_entropy, ROWS),
    "softplus": (rows(nn.Softplus(), nn.Linear(7, 7), nn.ReLU()), F.cross_entropy, ROWS),
    "approximate gelu": (rows(nn.GELU(approximate="tanh")), F.cross_entropy, ROWS),
    "parameter and buffer": (rows(Learned(7)), F.cross_entropy, ROWS),
    "smoothed labels": (rows(nn.Tanh()), smoothed, ROWS),
    "another loss": (rows(nn.Tanh()), F.huber_loss, "mse"),
    "two terms": (rows(nn.Tanh()), two_terms, "mse"),
    "last": (rows(nn.Tanh()).append(nn.Softplus()), F.mse_loss, "mse"),
    "images, mish": (images(lambda c: nn.Mish(), lambda c: nn.ReLU()), F.cross_entropy, "images"),
    "images, excitation": (images(Excitation, lambda c: nn.ReLU()), F.cross_entropy, "images"),
    "tokens": (Tokens(), F.cross_entropy, "tokens"),
}


def case(name: str) -> tuple[nn.Module, Callable[..., Tensor], fm.TaskBatch]:
    torch.manual_seed(0)
    model, loss, kind = CASES[name]
    if kind == "images":
        return model.double(), loss, image_batch()
    if kind == "tokens":
        sets = [(torch.randint(11, (3, n, 5)), torch.randint(WAYS, (3, n))) for n in (4, 6)]
        return model.double(), loss, fm.TaskBatch(*sets)
    return model.double(), loss, batch_of(4, WAYS, kind)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_the_gradient_is_exact(name: str, steps: int) -> None:
    model, loss, tasks = case(name)
    maml = fm.MAML(model, loss, lr=0.1, steps=steps, executor="native")
    value, gradients = maml.value_and_grad(tasks)
    right = truth(model, loss, tasks, 0.1, steps)
    assert float(value) == pytest.approx(float(right[0]), rel=1e-12)
    assert relative_error(gradients, right[3]) <= EXACT
    explained = maml.explain(tasks)
    assert "cut at operations without kernels" in explained.executor
    assert {row.backend for row in explained.rows} == {"native", "callback"}
    assert all(row.reason.startswith("called back: ") for row in explained.rows if row.backend == "callback")


@pytest.mark.parametrize(
    "options",
    [
        {"first_order": True},
        {"lr": nn.Parameter(torch.tensor(0.1, dtype=torch.float64))},
        {"parameters": ["4.*", "9.*"]},
    ],
    ids=["first order", "learned rate", "a part adapts"],
)
def test_other_kinds_of_meta_steps(options: dict[str, Any]) -> None:
    model, loss, tasks = case("images, mish")
    (value, ours), (right, reference) = both(model, loss, tasks, **{"lr": 0.1, "steps": 2} | options)
    assert float(value) == pytest.approx(float(right), rel=1e-12)
    assert relative_error(ours, reference) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_instruction_set(instruction_set: str, dtype: torch.dtype) -> None:
    for name in ("parameter and buffer", "images, excitation"):
        model, loss, tasks = case(name)
        model, given = model.to(dtype), tasks.to(dtype=dtype)
        maml = fm.MAML(model, loss, lr=0.1, steps=2, executor="native")
        error = total_error(maml.value_and_grad(given)[1], truth(model, loss, given, 0.1, 2)[3])
        assert error <= (EXACT if dtype == torch.float64 else 1e-5)
        assert f"instruction set {instruction_set}" in maml.explain(given).executor
        model.double()


def test_the_number_of_threads_and_of_callers_changes_no_bit() -> None:
    model, loss, tasks = case("images, excitation")
    maml = fm.MAML(model, loss, lr=0.1, steps=2, executor="native")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(maml.value_and_grad(tasks)[1])
    torch.set_num_threads(before)
    callers = [threading.Thread(target=lambda: results.append(maml.value_and_grad(tasks)[1])) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 7
    for other in results[1:]:
        assert all(torch.equal(results[0][n], other[n]) for n in other)


def test_an_exception_inside_comes_out_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, tasks = case("softplus")
    maml = fm.MAML(model, loss, lr=0.1, steps=2, executor="native")
    right = maml.value_and_grad(tasks)
    calls: list[Activation] = []

    def fails(self: Activation, saved: Tensors, x_dot: Tensors) -> tuple[Tensors, Tensors]:
        calls.append(self)
        raise ValueError("no tangent today")

    with monkeypatch.context() as patched:
        patched.setattr(Activation, "tangent", fails)
        with pytest.raises(ValueError, match="no tangent today"):
            maml.value_and_grad(tasks)
    assert len(calls) == 1  # what would follow is left out
    again = maml.value_and_grad(tasks)
    assert torch.equal(right[0], again[0])
    assert all(torch.equal(right[1][n], again[1][n]) for n in right[1])


def test_what_maps_keep_lives_no_longer_than_the_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, tasks = case("mish")
    kept: list[weakref.ref[Tensor]] = []
    forward = GenericOp.forward

    def watched(self: GenericOp, x: list[Tensor]) -> tuple[Tensors, Tensors]:
        y, saved = forward(self, x)
        kept.extend(weakref.ref(s) for s in saved if s is not None)
        return y, saved

    monkeypatch.setattr(GenericOp, "forward", watched)
    fm.MAML(model, loss, lr=0.1, steps=2, executor="native").value_and_grad(tasks)
    gc.collect()
    assert kept
    assert all(each() is None for each in kept)


def test_the_planner_cuts_where_that_takes_less_time() -> None:
    def softplus(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, width), nn.Softplus(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def executor(width: int, tasks: int) -> str:
        batch = batch_of(3, 4, "mse", sizes=(25, 25), tasks=tasks, dtype=torch.float32)
        return fm.MAML(softplus(width), F.mse_loss, lr=0.1, steps=3, plan="dense").explain(batch).executor

    many = executor(8, 100)  # a call back for each task takes longer than all the rest
    assert many.startswith("reference, because cut at operations without native kernels it would take longer")
    assert "softplus" in many
    assert executor(8, 1).startswith("native")
    assert executor(1024, 4).startswith("native")


def test_a_cut_program_is_dropped_with_its_model() -> None:
    def alive() -> set[int]:
        gc.collect()
        return {id(each) for each in gc.get_objects() if type(each) is Callbacks}

    others = alive()
    model, loss, tasks = case("mish")
    maml = fm.MAML(model, loss, lr=0.1, executor="native")
    maml.value_and_grad(tasks)
    assert alive() - others
    del maml, model
    assert alive() <= others


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True)


class Weighted(nn.Module):
    """A weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm())


class Parts(nn.Module):
    """Reads a value in three places, and an operation of its own in two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = F.mish(x)
        a, b, c = (layer(first) for layer in self.layers)
        return torch.cat([(a * first)[:, :3], b.cumsum(1)[:, 3:5], c.cos()[:, 5:]], 1)


class Attending(nn.Module):
    """Self-attention over padded tokens behind a frozen table: masks from the data, three values read at once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(11, 8, padding_idx=0), nn.Embedding(5, 8)
        self.register_buffer("places", torch.arange(5).unsqueeze(0))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm, self.head, self.dropout = nn.LayerNorm(8), nn.Linear(8, WAYS), nn.Dropout(dropout)
        self.places: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        seen = tokens != 0
        x = self.norm(self.table(tokens) + self.place(self.places.expand(len(tokens), -1)))
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.layers)
        scores = (q @ k.transpose(2, 3)) * 0.5 + torch.where(seen, 0.0, -1e9)[:, None, None, :]
        mixed = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        weights = seen.unsqueeze(-1).to(x.dtype)
        return self.head(((x + mixed) * weights).sum(1) / weights.sum(1))


@functools.cache
def attending() -> nn.Module:
    torch.manual_seed(0)
    return Attending().double()


@pytest.mark.parametrize("adapted", [None, ["layers.*", "head.*"], ["head.*"]], ids=["all", "linear", "head"])
@pytest.mark.parametrize("first_order", [False, True])
def test_attention_with_masks_from_the_data(adapted: list[str] | None, first_order: bool) -> None:
    model = attending()
    torch.manual_seed(1)
    tokens = [torch.randint(1, 11, (3, n, 5)) * (torch.arange(5) < torch.randint(2, 6, (3, n, 1))) for n in (4, 6)]
    tasks = fm.TaskBatch(*((t, torch.randint(WAYS, t.shape[:2])) for t in tokens))
    options: dict[str, Any] = {"lr": 0.1, "steps": 2, "parameters": adapted, "first_order": first_order}
    (value, ours), (right, reference) = both(model, F.cross_entropy, tasks, **options)
    assert float(value) == pytest.approx(float(right), rel=1e-12)
    assert relative_error(ours, reference) <= EXACT
    explained = fm.MAML(model, F.cross_entropy, executor="native", **options).explain(tasks)
    assert {row.backend for row in explained.rows} == {"native", "callback", "reference"}
    assert any("reads the tasks' data alone" in row.reason for row in explained.rows)


@pytest.mark.parametrize("steps", [1, 3])
def test_values_with_several_readers(steps: int) -> None:
    model, tasks = rows(Parts()).double(), batch_of(4, WAYS, ROWS)
    found = fm.MAML(model, F.cross_entropy, lr=0.1, steps=steps, executor="native").value_and_grad(tasks)[1]
    assert relative_error(found, truth(model, F.cross_entropy, tasks, 0.1, steps)[3]) <= EXACT


def test_a_program_that_would_hold_too_much_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, tasks = case("softplus")
    assert fm.MAML(model, loss, steps=3).explain(tasks).executor.startswith("native")
    monkeypatch.setattr("fastmeta.engine.native.ROOM", 1000)
    executor = fm.MAML(model, loss, steps=3).explain(tasks).executor
    assert executor.startswith("reference, because cut at operations without native kernels it would hold 0 MiB")


@pytest.mark.parametrize(
    ("model", "tasks", "reason"),
    [
        (rows(Dropped()), batch_of(4, WAYS, ROWS), "random"),
        (rows(Weighted()), batch_of(4, WAYS, ROWS), "would be a weight"),
    ],
    ids=["dropout", "computed weight"],
)
def test_what_cannot_be_called_back_falls_to_the_reference_as_a_whole(
    model: nn.Module, tasks: fm.TaskBatch, reason: str
) -> None:
    model = model.double()
    executor = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2).explain(tasks).executor
    assert executor.startswith("reference, because")
    assert reason in executor
    with pytest.raises(RuntimeError, match="executor 'native' is not available here"):
        fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native").value_and_grad(tasks)


@pytest.mark.parametrize("number", [-1, 11])
def test_an_index_outside_of_the_table_raises(number: int) -> None:
    model, loss, tasks = case("tokens")
    maml = fm.MAML(model, loss, lr=0.1, executor="native")
    before = maml.value_and_grad(tasks)
    wrong = tasks.query[0].clone()
    wrong[2, 1, 3] = number
    with pytest.raises(IndexError, match=rf"indices must be in \[0, 11\), got {number}; check the tokenizer"):
        maml.value_and_grad(fm.TaskBatch(tasks.support, (wrong, tasks.query[1])))
    after = maml.value_and_grad(tasks)
    assert all(torch.equal(before[1][n], after[1][n]) for n in before[1])


class Crossed(nn.Module):
    """Attention of few queries to many keys, scaled before and after, without a mask; its input is read again."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, width = heads, heads * dim
        self.query, self.key, self.value = nn.Linear(4, width), nn.Linear(5, width), nn.Linear(5, width)
        self.head = nn.Linear(width, WAYS)

    def forward(self, few: Tensor, many: Tensor) -> Tensor:
        queries = self.query(few)
        split = [y.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3) for y in (self.key(many), self.value(many))]
        scores = (queries.unflatten(-1, (self.heads, -1)).permute(0, 2, 1, 3) / 1.3) @ split[0].mT * 0.7
        mixed = (scores.softmax(-1) @ split[1]).permute(0, 2, 1, 3).reshape(queries.shape)
        return self.head(torch.tanh(mixed + queries)).mean(1)


@functools.cache
def crossed(heads: int, dim: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Crossed(heads, dim).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("heads", "dim"), [(1, 3), (2, 5), (3, 16)])
def test_attention_is_native(instruction_set: str, heads: int, dim: int, dtype: torch.dtype) -> None:
    model = crossed(heads, dim, dtype)
    torch.manual_seed(1)
    sets = []
    for n in (4, 6):
        x = torch.randn(3, n, 3, 4, dtype=dtype), torch.randn(3, n, 18, 5, dtype=dtype)
        sets.append((x, torch.randint(WAYS, (3, n))))
    tasks = fm.TaskBatch(*sets)
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native")
    error = total_error(maml.value_and_grad(tasks)[1], truth(model, F.cross_entropy, tasks, 0.1, 2)[3])
    # float32: eps times the square root of 48 terms, through products, exponentials and two steps
    assert error <= (EXACT if dtype == torch.float64 else 1e-5)
    explained = maml.explain(tasks)
    assert f"instruction set {instruction_set}" in explained.executor
    assert {row.backend for row in explained.rows if row.op in ("matmul", "softmax")} == {"native"}


@pytest.mark.parametrize("executor", ["native", "reference"])
def test_what_is_computed_of_data_alone_runs_before(executor: str) -> None:
    """Scaled inputs: once a meta-step, for all tasks; the layer behind them may still hold products with its data."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(torch.tanh(2 * x - 1))

    torch.manual_seed(0)
    model = Scaled().double()
    made = [(torch.rand(4, n, 64, dtype=torch.float64), torch.randint(3, (4, n))) for n in (2, 3)]
    tasks = fm.TaskBatch(*made)
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=4, executor=executor)
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.1, 4)[3]
    assert relative_error(maml.value_and_grad(tasks)[1], truth) <= 1e-11
    if executor == "native":
        rows = maml.explain(tasks).rows
        assert [row.backend for row in rows[:3]] == ["reference"] * 3
        first = next(row for row in rows if row.op == "linear")
        assert first.plan == "factored"

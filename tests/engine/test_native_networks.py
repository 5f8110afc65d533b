"""Normalised and residual networks on the native executor: exact in float64, as good as PyTorch in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from tests.engine.test_native import ACTIVATIONS, SETS, batch_of, both, check_float32, truth
from tests.oracle import maml_loop, relative_error, total_error

pytestmark = [
    pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}"),
    pytest.mark.usefixtures("traced_once"),
]
EXACT = 1e-10  # float64 rounding through a norm's cancellations; a wrong term shows above 1e-3
WAYS = 3

IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda c: nn.GroupNorm(2, c),
    "group of all": lambda c: nn.GroupNorm(1, c, affine=False),
    "instance": lambda c: nn.InstanceNorm2d(c),
    "instance, affine": lambda c: nn.InstanceNorm2d(c, affine=True),
    "batch": lambda c: nn.BatchNorm2d(c),
    "batch, no affine": lambda c: nn.BatchNorm2d(c, affine=False, track_running_stats=False),
}
ROW_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda d: nn.LayerNorm(d),
    "layer, no bias": lambda d: nn.LayerNorm(d, bias=False),
    "layer, no affine": lambda d: nn.LayerNorm(d, elementwise_affine=False),
    "group": lambda d: nn.GroupNorm(3, d),
    "batch": lambda d: nn.BatchNorm1d(d),
}


def scrambled(model: nn.Module) -> nn.Module:
    """``model`` in float64 with the weights of its norms away from one and zero."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, *((0.5, 1.5) if name.endswith("weight") else (-0.3, 0.3)))
    return model.double()


class Residual(nn.Module):
    """Two blocks that read the images and their own results twice, a pool, a head."""

    def __init__(
        self, norm: Callable[[int], nn.Module], activation: nn.Module, channels: int = 4, width: int = 6
    ) -> None:
        super().__init__()
        self.stem, self.shortcut = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(channels, width, 1, bias=False)
        self.inner, self.activation = nn.Conv2d(width, width, 3, padding=1, bias=False), activation
        self.first, self.second, self.last = norm(width), norm(width), norm(width)
        self.head = nn.Linear(width, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.first(self.stem(x)))
        h = self.activation(self.second(self.inner(h)) + self.shortcut(x) + h)
        h = F.max_pool2d(self.activation(self.last(h + h)), 2)
        return self.head(h.mean((2, 3)))


class Rows(nn.Module):
    """Residual layers normalised before and after, with a skip from the data."""

    def __init__(self, norm: Callable[[int], nn.Module], activation: nn.Module, width: int = 18) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.before, self.after, self.activation = norm(width), norm(width), activation
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        h = h + self.activation(self.inner(self.before(h)))
        h = self.after(h + self.activation(h))
        return self.head(torch.tanh(x + self.out(h)))


def images(tasks: int = 3, sizes: tuple[int, int] = (3, 5), channels: int = 4, side: int = 5) -> fm.TaskBatch:
    torch.manual_seed(1)
    return fm.TaskBatch(
        *((torch.randn(tasks, n, channels, side, side).double(), torch.randint(WAYS, (tasks, n))) for n in sizes)
    )


def rows(tasks: int = 3, sizes: tuple[int, int] = (4, 7)) -> fm.TaskBatch:
    torch.manual_seed(1)
    return fm.TaskBatch(*((torch.randn(tasks, n, 4).double(), torch.randint(WAYS, (tasks, n))) for n in sizes))


def check(
    model: nn.Module, tasks: fm.TaskBatch, loss: Callable[..., Tensor] = F.cross_entropy, **options: object
) -> None:
    (value, ours), (right, reference) = both(model, loss, tasks, **{"lr": 0.1, "steps": 2, **options})
    assert float(value) == pytest.approx(float(right), rel=1e-11)
    assert total_error(ours, reference) <= EXACT


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same weights whatever ran before; one thread, as these are small."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("norm", list(IMAGE_NORMS))
def test_residual_convolutions_by_norm(norm: str) -> None:
    model, tasks = scrambled(Residual(IMAGE_NORMS[norm], nn.ReLU())), images()
    check(model, tasks)
    found = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native").value_and_grad(tasks)[1]
    assert total_error(found, truth(model, F.cross_entropy, tasks, 0.1, 2)[3]) <= EXACT


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_residual_convolutions_by_activation(activation: str) -> None:
    check(scrambled(Residual(IMAGE_NORMS["group"], ACTIVATIONS[activation]())), images())


@pytest.mark.parametrize("norm", list(ROW_NORMS))
def test_residual_rows_by_norm(norm: str) -> None:
    model, tasks = scrambled(Rows(ROW_NORMS[norm], nn.GELU())), rows()
    check(model, tasks)
    found = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native").value_and_grad(tasks)[1]
    assert total_error(found, truth(model, F.cross_entropy, tasks, 0.1, 2)[3]) <= EXACT


@functools.cache
def rows_of_whole_vectors(norm: str, activation: str) -> tuple[nn.Module, fm.TaskBatch]:
    """More rows than are summed at a time, each of whole vectors, and more of those than are summed at a time."""
    first, last = nn.Linear(4, 96), nn.Linear(96, WAYS)
    model = scrambled(nn.Sequential(first, ROW_NORMS[norm](96), ACTIVATIONS[activation](), last))
    return model, batch_of(4, WAYS, "cross entropy", sizes=(40, 35), tasks=2)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("norm", "activation"),
    [("layer", "identity"), ("layer", "gelu"), ("layer, no bias", "tanh"), ("layer, no affine", "relu")],
)
def test_layer_norm_of_whole_vectors(norm: str, activation: str, name: str) -> None:
    extension = native.extension()
    extension.use_instruction_set(name)
    try:
        model, tasks = rows_of_whole_vectors(norm, activation)
        found = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native").value_and_grad(tasks)[1]
        assert total_error(found, truth(model, F.cross_entropy, tasks, 0.1, 2)[3]) <= EXACT
        check_float32(model, tasks, 0.1)
    finally:
        extension.use_instruction_set("")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_residual_rows_by_activation(activation: str) -> None:
    check(scrambled(Rows(ROW_NORMS["layer"], ACTIVATIONS[activation]())), rows())


@functools.cache
def normal_rows() -> nn.Module:
    return scrambled(Rows(ROW_NORMS["layer"], nn.SiLU()))


@functools.cache
def normal_images() -> nn.Module:
    return scrambled(Residual(IMAGE_NORMS["group"], nn.Tanh()))


@functools.cache
def wide_rows() -> nn.Module:
    return scrambled(Rows(nn.LayerNorm, nn.GELU(), 70))


@functools.cache
def wide_images() -> nn.Module:
    return scrambled(Residual(IMAGE_NORMS["group"], nn.SiLU(), width=20))


@pytest.mark.parametrize(
    "options",
    [
        {"first_order": True},
        {"steps": 0},
        {"steps": 4, "lr": 0.05},
        {"parameters": ["head.*"]},
        {"parameters": ["before.*", "after.*"]},
        {"parameters": ["into.*", "after.weight"]},
        {"parameters": ["inner.*"], "first_order": True},
        {"lr": torch.tensor([0.1, 0.3], dtype=torch.float64)},
    ],
    ids=["first order", "no steps", "four steps", "head", "norms", "some", "some, first order", "rate a step"],
)
def test_options(options: dict[str, object]) -> None:
    check(normal_rows(), rows(), **options)


@pytest.mark.parametrize("parameters", [["first.*"], ["last.bias", "stem.weight"], ["shortcut.*"], ["head.*"]])
def test_convolutions_of_which_some_adapt(parameters: list[str]) -> None:
    check(normal_images(), images(), parameters=parameters)


def test_learned_rates() -> None:
    model, tasks = scrambled(Rows(ROW_NORMS["layer"], nn.Tanh())), rows()
    (_, ours), (_, reference) = (
        fm.MAML(
            model, F.cross_entropy, lr=nn.Parameter(torch.tensor([0.1, 0.2]).double()), steps=2, executor=e
        ).value_and_grad(tasks)
        for e in ("native", "reference")
    )
    assert any(name.startswith("lr") for name in ours)
    assert relative_error(ours, reference) <= EXACT


@pytest.mark.parametrize("kind", ["images", "rows"])
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_in_both_precisions(name: str, kind: str) -> None:
    extension = native.extension()
    extension.use_instruction_set(name)
    try:
        model, tasks = (wide_images(), images()) if kind == "images" else (wide_rows(), rows())
        double = fm.MAML(model, F.cross_entropy, lr=0.2, executor="native").value_and_grad(tasks)[1]
        assert total_error(double, truth(model, F.cross_entropy, tasks, 0.2, 1)[3]) <= EXACT
        check_float32(model, tasks, 0.2)
    finally:
        extension.use_instruction_set("")


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4)], ids=["layer", "group", "batch"]
)
def test_statistics_of_numbers_far_from_zero(norm: nn.Module) -> None:
    model = scrambled(nn.Sequential(norm, nn.Linear(4, WAYS))).float()
    tasks = rows()
    far = fm.TaskBatch(*((x + 1000, y) for x, y in (tasks.support, tasks.query))).to(dtype=torch.float32)
    right = truth(model, F.cross_entropy, far, 0.1, 2)[3]
    ours = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native").value_and_grad(far)[1]
    torchs = maml_loop(model, F.cross_entropy, far.support, far.query, 0.1, 2)[3]
    assert total_error(ours, right) <= 2 * total_error(torchs, right) + 1e-6  # a few roundings of our own


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: F.max_pool2d(x, 2),
    "overlapping max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average": lambda x: F.avg_pool2d(x, 2),
    "average, padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 3),
    "global": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x.mean((-1, -2), keepdim=True),
    "large": lambda x: F.avg_pool2d(x, 17, 1, 8),
}


class Pooled(nn.Module):
    """A pool after a group norm, and of the images themselves."""

    def __init__(self, pool: Callable[[Tensor], Tensor], side: int) -> None:
        super().__init__()
        self.layer, self.norm, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), pool
        self.head = nn.Linear(pool(torch.zeros(1, 4, side, side)).numel(), WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.tanh(self.norm(self.layer(x)))) + self.pool(x)
        return self.head(h.flatten(1))


@pytest.mark.parametrize("name", list(POOLS))
def test_pools_that_no_convolution_takes_along(name: str) -> None:
    check(scrambled(Pooled(POOLS[name], 9)), images(side=9))


def test_an_output_that_is_read_again() -> None:
    model, tasks = scrambled(nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, WAYS))), rows()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x + torch.sigmoid(x), y)

    check(model, tasks, loss)
    ours, right = (fm.MAML(model, loss, lr=0.1, steps=2, executor=e)(tasks) for e in ("native", "reference"))
    torch.testing.assert_close(ours.logits, right.logits, rtol=1e-11, atol=1e-12)


def test_norms_over_several_rows_and_over_whole_images() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:  # [N, 5, 4]
            h = F.layer_norm(self.into(x), (5, 6))
            return self.head(F.layer_norm(h, (6,)))

    torch.manual_seed(1)
    tasks = fm.TaskBatch(*((torch.randn(3, n, 5, 4).double(), torch.randn(3, n, 5, 2).double()) for n in (3, 4)))
    check(Sequences().double(), tasks, F.mse_loss)
    whole = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.LayerNorm([6, 3, 3], elementwise_affine=False), nn.Flatten(), nn.Linear(54, WAYS)
    )
    check(whole.double(), images())


class Odd(nn.Module):
    """A network around one function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(4, 4), nn.Linear(4, WAYS), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x), x))


@pytest.mark.parametrize(
    "function",
    [
        lambda h, x: F.gelu(x - h),
        lambda h, x: torch.add(torch.tanh(h), h, alpha=0.3),
        lambda h, x: torch.rsub(x, h, alpha=2),
        lambda h, x: F.silu(-h) * 0.2,
        lambda h, x: torch.tanh(h / 3) + h,
    ],
    ids=["difference", "weighted", "reverse", "number", "quotient"],
)
def test_sums_and_multiples(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    check(Odd(function).double(), rows())


class Seen(nn.Module):
    """A convolution whose result is read in other shapes than its own."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.way = nn.Conv2d(4, 6, 2), nn.Linear(96, WAYS), way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self.layer(x)).flatten(1))  # [N, 6, 4, 4] in between


@pytest.mark.parametrize(
    "way",
    [
        lambda h: torch.tanh(h.flatten(1)),
        lambda h: torch.tanh(h.view(-1, 6, 16)).view(h.shape) + h,
        lambda h: F.relu(F.max_pool2d(h.view(-1, 6, 4, 4), 1)),
    ],
    ids=["rows", "planes", "the same"],
)
def test_renamed_values(way: Callable[[Tensor], Tensor]) -> None:
    check(Seen(way).double(), images())


@pytest.mark.parametrize(
    ("model", "data", "reason"),
    [
        (Odd(lambda h, x: h + 1), rows, "not a sum of values"),
        (Odd(lambda h, x: h + x[:1]), rows, "native kernel"),
        (Odd(lambda h, x: h + h[0]), rows, "native kernel"),
        (Odd(lambda h, x: h * x), rows, "of two tensors"),
        (Seen(lambda h: F.max_pool2d(h.view(-1, 3, 8, 4), 2).repeat(1, 1, 2, 2)), images, "read as (3, 3, 8, 4)"),
        (Odd(lambda h, x: h.mean(1, keepdim=True) + h), rows, "not the mean of images"),
        (Odd(lambda h, x: F.layer_norm(h.view(-1, 2, 2), (2,), torch.ones(2).double()).view(-1, 4)), rows, "buffer"),
        (
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm([6, 3, 3]), nn.Flatten(), nn.Linear(54, WAYS)),
            images,
            "pixels",
        ),
        (
            nn.Sequential(nn.Conv2d(4, 6, 3), nn.LayerNorm(3), nn.Flatten(), nn.Linear(54, WAYS)),
            images,
            "layer norm over",
        ),
    ],
    ids=[
        *("number", "slice", "broadcast", "product", "other images", "mean of rows", "weights of a buffer"),
        *("a weight a pixel", "rows of images"),
    ],
)
@pytest.mark.parametrize("executor", ["auto", "native"])
def test_what_has_no_kernel_is_called_back_or_runs_on_the_reference(
    model: nn.Module, data: Callable[[], fm.TaskBatch], reason: str, executor: Literal["auto", "native"]
) -> None:
    model, tasks = model.double(), data()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, executor=executor)
    assert reason in str(maml.explain(tasks))
    assert total_error(maml.value_and_grad(tasks)[1], truth(model, F.cross_entropy, tasks, 0.1, 1)[3]) <= EXACT


def test_an_output_that_the_loss_does_not_depend_on_runs_on_the_reference() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, WAYS)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.head(h), torch.tanh(h)

    def loss(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(outputs[0], y)

    model, tasks = Two().double(), rows()
    maml = fm.MAML(model, loss, lr=0.1)
    assert "the loss must depend on every value" in maml.explain(tasks).executor
    assert total_error(maml.value_and_grad(tasks)[1], truth(model, loss, tasks, 0.1, 1)[3]) <= EXACT


@settings(deadline=None, max_examples=8)
@given(
    groups=st.integers(1, 5),
    of=st.integers(1, 9),
    side=st.integers(2, 9),
    sizes=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    norm=st.sampled_from(["group", "instance", "batch"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    steps=st.integers(1, 3),
)
def test_random_residual_networks(groups, of, side, sizes, norm, activation, steps) -> None:
    norms = {
        "group": lambda c: nn.GroupNorm(groups, c),
        "instance": lambda c: nn.GroupNorm(c, c),
        "batch": nn.BatchNorm2d,
    }
    model = scrambled(Residual(norms[norm], ACTIVATIONS[activation](), channels=2, width=groups * of))
    batch = images(2, sizes, channels=2, side=side)
    (value, ours), (right, reference) = both(model, F.cross_entropy, batch, lr=0.05, steps=steps)
    assert float(value) == pytest.approx(float(right), rel=1e-9)
    assert total_error(ours, reference) <= 1e-8  # norms over very few pixels amplify rounding


@settings(deadline=None, max_examples=8)
@given(
    width=st.integers(1, 40),
    norm=st.sampled_from(["layer", "layer, no bias", "layer, no affine", "batch"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    sizes=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    steps=st.integers(0, 3),
)
def test_random_residual_rows(width, norm, activation, sizes, steps) -> None:
    model = scrambled(Rows(ROW_NORMS[norm], ACTIVATIONS[activation](), width))
    (value, ours), (right, reference) = both(model, F.cross_entropy, rows(sizes=sizes), lr=0.05, steps=steps)
    assert float(value) == pytest.approx(float(right), rel=1e-9)
    assert total_error(ours, reference) <= 1e-8  # norms over very few features amplify rounding

"""Convolutional networks on the native executor: exact in float64, as good as PyTorch in float32."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastmeta as fm
from fastmeta.core import native
from tests.engine.test_native import both
from tests.oracle import maml_loop, relative_error, total_error

_C = native.extension()
pytestmark = [
    pytest.mark.skipif(_C is None, reason=f"no extension: {native.missing_reason()}"),
    pytest.mark.usefixtures("one_thread", "traced_once"),
]
EXACT = 1e-10  # float64 rounding through batch norm's cancellations; a wrong term shows above 1e-3
SETS = [name for name in ("plain", "v3", "v4") if _C is not None and name in _C.supported_instruction_sets()]
WAYS = 3


def block(channels: int, filters: int, **kinds: object) -> list[nn.Module]:
    """One block; ``kinds`` are the convolution's settings, and ``norm``, ``activation`` and ``pool``."""
    k = {"kernel": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1, "bias": True, **kinds}
    convolution = nn.Conv2d(
        channels, filters, k["kernel"], k["stride"], k["padding"], k["dilation"], k["groups"], k["bias"]
    )
    norm = k.get("norm", nn.BatchNorm2d(filters, track_running_stats=False))
    if isinstance(norm, nn.BatchNorm2d) and norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    parts = [convolution, norm, k.get("activation", nn.ReLU()), k.get("pool", nn.MaxPool2d(2))]
    return [part for part in parts if part is not None]


def network(channels: int, size: int, *blocks: dict[str, object], filters: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, kinds in enumerate(blocks):
        layers += block(filters if i else channels, filters, **kinds)
    body = nn.Sequential(*layers, nn.Flatten())
    features = body(torch.randn(2, channels, size, size)).shape[1]
    return nn.Sequential(*body, nn.Linear(features, WAYS)).double()


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28**2, 400), nn.Linear(400, WAYS)).double()


def episodes(channels: int, size: int, sizes: tuple[int, int] = (3, 5), tasks: int = 3) -> fm.TaskBatch:
    torch.manual_seed(1)
    return fm.TaskBatch(
        *((torch.randn(tasks, n, channels, size, size).double(), torch.randint(WAYS, (tasks, n))) for n in sizes)
    )


def errors(model: nn.Module, tasks: fm.TaskBatch, **options: object) -> float:
    (_, ours), (_, right) = both(model, F.cross_entropy, tasks, **{"lr": 0.2, "steps": 2, **options})
    return relative_error(_moving(ours, model), _moving(right, model))


def _moving(gradients: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Without the biases that batch norm cancels: theirs are zero here, and rounding in the reference."""
    idle = {
        f"{i}.bias"
        for i, (m, after) in enumerate(zip(model, [*model][1:], strict=False))
        if isinstance(m, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
    }
    for name in idle & set(gradients):
        assert float(gradients[name].abs().max()) < 1e-12
    return {name: g for name, g in gradients.items() if name not in idle}


@functools.cache
def colours() -> nn.Sequential:
    return KINDS["colour"]()


@functools.cache
def depthwise() -> nn.Sequential:
    return GROUPS["depthwise, many channels"]()


@functools.cache
def three_blocks() -> nn.Sequential:
    return network(1, 14, {}, {}, {}, filters=20)


KINDS: dict[str, Callable[[], nn.Sequential]] = {
    "conv4, odd halves": lambda: network(1, 28, {}, {}, {}, {}),
    "colour": lambda: network(3, 11, {}, {}),
    "many channels": lambda: network(17, 6, {}, {}, filters=33),
    "no norm": lambda: network(2, 9, {"norm": None}, {"norm": None}),
    "no affine": lambda: network(2, 9, *[{"norm": nn.BatchNorm2d(8, affine=False, track_running_stats=False)}] * 1, {}),
    "running statistics kept apart": lambda: network(2, 9, {"norm": nn.BatchNorm2d(8)}, {"norm": nn.BatchNorm2d(8)}),
    "no bias": lambda: network(2, 9, {"bias": False}, {"bias": False}),
    "stride instead of pool": lambda: network(1, 14, *[{"pool": None, "stride": 2}] * 3),
    "5x5": lambda: network(2, 10, {"kernel": 5, "padding": 2}, {"kernel": 5, "padding": 2}),
    "1x1": lambda: network(2, 6, {"kernel": 1, "padding": 0}, {"kernel": 1, "padding": 0}),
    "no padding": lambda: network(2, 12, {"padding": 0}, {"padding": 0}),
    "dilation": lambda: network(2, 10, {"dilation": 2, "padding": 2}, {"dilation": 2, "padding": 2}),
    "average pool": lambda: network(2, 9, {"pool": nn.AvgPool2d(2)}, {"pool": nn.AvgPool2d(2)}),
    "average of many pixels": lambda: network(2, 18, {"pool": nn.AvgPool2d(17, 1)}),
    "overlapping pool": lambda: network(2, 9, {"pool": nn.MaxPool2d(3, 2, 1)}, {"pool": nn.MaxPool2d(3, 2, 1)}),
    "leaky": lambda: network(2, 9, {"activation": nn.LeakyReLU(0.1)}, {"activation": nn.LeakyReLU(0.1)}),
    "tanh": lambda: network(2, 9, {"activation": nn.Tanh()}, {"activation": nn.Tanh()}),
    "sigmoid": lambda: network(2, 9, {"activation": nn.Sigmoid()}, {"activation": nn.Sigmoid()}),
    "silu": lambda: network(2, 9, {"activation": nn.SiLU()}, {"activation": nn.SiLU(), "pool": None}),
    "gelu": lambda: network(2, 9, {"activation": nn.GELU()}, {"activation": nn.GELU()}),
    "no activation": lambda: network(2, 9, {"activation": None}, {"activation": None}),
    "oblong kernel": lambda: network(
        2, 9, {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
    ),
}


@pytest.mark.parametrize("name", list(KINDS))
def test_blocks_agree_with_the_reference(name: str) -> None:
    model = KINDS[name]()
    tasks = episodes(model[0].in_channels, _size(name))
    assert errors(model, tasks) <= EXACT


GROUPS: dict[str, Callable[[], nn.Sequential]] = {
    "two": lambda: network(2, 9, {}, {"groups": 2}, {"groups": 2, "pool": None}, filters=12),
    "depthwise": lambda: network(2, 9, {}, {"groups": 36, "pool": None}, filters=36),
    "depthwise, many channels": lambda: network(2, 9, {}, {"groups": 70}, {"groups": 70, "pool": None}, filters=70),
    "depthwise and pointwise": lambda: network(
        2, 9, {}, {"groups": 64, "norm": None}, {"kernel": 1, "padding": 0, "pool": None}, filters=64
    ),
    "data": lambda: network(70, 5, {"groups": 70, "pool": None}, {"groups": 10}, filters=70),
    "several a group": lambda: network(2, 9, {}, {"groups": 23, "stride": 2, "pool": None}, filters=69),
}


@pytest.mark.parametrize("name", list(GROUPS))
def test_grouped_convolutions(name: str) -> None:
    model = GROUPS[name]()
    tasks = episodes(model[0].in_channels, 5 if name == "data" else 9)
    assert errors(model, tasks) <= EXACT
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.2, 2)[3]
    assert total_error(fm.MAML(model, F.cross_entropy, lr=0.2, steps=2).value_and_grad(tasks)[1], truth) <= EXACT


@pytest.mark.parametrize("name", SETS)
def test_grouped_convolutions_by_instruction_set(name: str) -> None:
    _C.use_instruction_set(name)
    try:
        assert errors(depthwise(), episodes(2, 9), steps=1) <= EXACT
    finally:
        _C.use_instruction_set("")


def test_packed_weights_of_depthwise_convolutions_do_not_grow_with_their_square() -> None:
    def size(channels: int) -> float:
        model = network(2, 5, {}, {"groups": channels, "pool": None}, filters=channels)
        text = str(fm.MAML(model, F.cross_entropy, lr=0.2, executor="native").explain(episodes(2, 5)))
        return float(re.findall(r"fast weights ([\d.]+) KiB", text)[0])

    assert size(512) < 4.1 * size(128)


def _size(name: str) -> int:
    sizes = {"conv4, odd halves": 28, "colour": 11, "many channels": 6, "stride instead of pool": 14}
    sizes["average of many pixels"] = 18
    return sizes.get(name) or {"5x5": 10, "1x1": 6, "no padding": 12, "dilation": 10}.get(name, 9)


@pytest.mark.parametrize(
    "options",
    [
        {"first_order": True},
        {"steps": 0},
        {"steps": 5, "lr": 0.05},
        {"parameters": ["9.*"]},
        {"parameters": ["4.*", "5.*"]},
        {"lr": torch.tensor([0.1, 0.3], dtype=torch.float64)},
    ],
    ids=["first order", "no steps", "five steps", "head", "inner block", "rate a step"],
)
def test_options(options: dict[str, object]) -> None:
    assert errors(colours(), episodes(3, 11), **options) <= EXACT


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_in_both_precisions(name: str) -> None:
    _C.use_instruction_set(name)
    try:
        model, tasks = three_blocks(), episodes(1, 14)
        truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.2, 1)[3]
        double = fm.MAML(model, F.cross_entropy, lr=0.2, executor="native").value_and_grad(tasks)[1]
        assert total_error(double, truth) <= EXACT
        small, single = copy.deepcopy(model).float(), tasks.to(dtype=torch.float32)
        ours = fm.MAML(small, F.cross_entropy, lr=0.2, executor="native").value_and_grad(single)[1]
        torchs = maml_loop(small, F.cross_entropy, single.support, single.query, 0.2, 1)[3]
        exact = single.to(dtype=torch.float64)
        right = maml_loop(copy.deepcopy(small).double(), F.cross_entropy, exact.support, exact.query, 0.2, 1)[3]
        assert total_error(ours, right) <= 2 * total_error(torchs, right) + 1e-6  # a few roundings of our own
    finally:
        _C.use_instruction_set("")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: network(2, 9, {"pool": nn.MaxPool2d(2, ceil_mode=True)}), "max_pool"),
        (lambda: network(2, 9, {"pool": nn.AdaptiveAvgPool2d(2)}), "adaptive pooling by windows that differ"),
    ],
    ids=["ceil mode", "adaptive pool"],
)
@pytest.mark.parametrize("executor", ["auto", "native"])
def test_what_has_no_kernel_is_called_back_or_runs_on_the_reference(
    model: Callable[[], nn.Module], reason: str, executor: Literal["auto", "native"]
) -> None:
    made, tasks = model(), episodes(2, 9)
    maml = fm.MAML(made, F.cross_entropy, lr=0.1, executor=executor)
    truth = maml_loop(made, F.cross_entropy, tasks.support, tasks.query, 0.1, 1)[3]
    assert total_error(maml.value_and_grad(tasks)[1], truth) <= EXACT
    assert reason in str(maml.explain(tasks))


def test_running_statistics_that_are_wanted_come_from_the_reference() -> None:
    model, tasks = network(2, 9, {"norm": nn.BatchNorm2d(8)}), episodes(2, 9)
    before = model[1].running_mean.clone()
    fm.MAML(model, F.cross_entropy, lr=0.1).value_and_grad(tasks)
    assert torch.equal(model[1].running_mean, before)
    fm.MAML(model, F.cross_entropy, lr=0.1, update_running_stats=True).value_and_grad(tasks)
    assert not torch.equal(model[1].running_mean, before)


@settings(deadline=None, max_examples=8)
@given(
    channels=st.integers(1, 5),
    filters=st.integers(1, 40),
    size=st.integers(4, 13),
    sizes=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    pool=st.sampled_from([None, "max", "average"]),
    norm=st.booleans(),
    activation=st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU]),
)
def test_random_blocks(channels, filters, size, sizes, kernel, stride, pool, norm, activation) -> None:
    kinds: dict[str, object] = {"kernel": kernel, "padding": kernel // 2, "stride": stride, "activation": activation()}
    kinds["pool"] = {None: None, "max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2)}[pool]
    if not norm:
        kinds["norm"] = None
    model = network(channels, size, kinds, {"pool": None}, filters=filters)
    (_, ours), (_, right) = both(model, F.cross_entropy, episodes(channels, size, sizes), lr=0.1)
    assert total_error(ours, right) <= 1e-9  # batch norm over very few pixels amplifies rounding


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_threads_changes_no_bit_within_a_task_either(tasks: int, dtype: torch.dtype) -> None:
    model = network(3, 44, {}, {}, {"stride": 2, "pool": None}, filters=19).to(dtype)
    batch = episodes(3, 44, tasks=tasks).to(dtype=dtype)
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native")
    results, sharing = [], []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(maml.value_and_grad(batch)[1])
        sharing.append(re.findall(r"tasks at once: (\d+), .* on (\d+) thread", maml.explain(batch).executor)[0])
    within = [("1", "1"), ("1", "2") if tasks == 1 else ("2", "1"), ("1", "3"), ("1", "8")]
    assert sharing == within
    for other in results[1:]:
        assert all(torch.equal(results[0][n], other[n]) for n in other)


@pytest.mark.parametrize(
    "model", [network(3, 28, {}, {}, filters=64), wide()], ids=["within tasks", "tasks side by side"]
)
def test_memory_that_cannot_be_had_is_an_error(model: nn.Module) -> None:
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2 * 10**7, executor="native")
    for threads in (1, 8):
        torch.set_num_threads(threads)
        with pytest.raises(MemoryError):  # steps of 7 MB are more than 2^47 bytes, all the addresses there are
            maml.value_and_grad(episodes(3, 28, (20, 2), tasks=2))

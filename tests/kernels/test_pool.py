"""Pooling's Triton kernels: every map in float32 against torch.func in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need
from fastmeta.ops.pool import AdaptiveAveragePool, AveragePool, MaxPool, reference
from fastmeta.ops.pool.op import LARGEST, Pool
from fastmeta.ops.pool.reference import Window
from tests.kernels import running
from tests.kernels.maps import check, runs
from tests.ops.four_maps import A, Case

pytestmark = pytest.mark.usefixtures("nan_poison")

aten = torch.ops.aten
DIVISION = 4  # roundings of each term, beside its sum
X = A((2, 3, 5, 6), "spread")  # one clear maximum in a window, in float32 as in float64


def of(shape: tuple[int, ...]) -> A:
    return A(shape, "spread")


def pooled(name: str, x: A, *window: object) -> Case:
    return Case(f"max-{name}", aten.max_pool2d.default, (x, *window))


def meant(name: str, x: A, *window: object) -> Case:
    return Case(f"average-{name}", aten.avg_pool2d.default, (x, *window))


def divided(name: str, x: A, size: list[int]) -> Case:
    return Case(f"adaptive-{name}", aten.adaptive_avg_pool2d.default, (x, size))


CASES = [
    pooled("plain", X, [2, 2]),
    pooled("square", X, [2]),
    pooled("overlapping", X, [3, 3], [2, 1], [1, 1]),
    pooled("apart", of((1, 2, 7, 7)), [2, 1], [3, 4]),
    pooled("dilated", X, [2, 2], [1, 1], [0, 0], [2, 3]),
    pooled("dilated-and-padded", X, [3, 2], [2, 1], [1, 1], [2, 1]),
    pooled("ceil", X, [2, 4], [2, 4], [0, 0], [1, 1], True),
    pooled("ceil-padded", of((1, 2, 6, 5)), [3, 3], [2, 2], [1, 1], [1, 1], True),
    pooled("of-one-image", of((3, 5, 6)), [2, 2]),
    pooled("one-channel", of((2, 1, 7, 5)), [3, 3], [2, 2], [1, 1]),
    pooled("many-channels", of((1, 70, 3, 4)), [2, 2], [1, 1]),
    pooled("one-pixel", of((2, 3, 1, 1)), [1, 1]),
    pooled("large", of((1, 3, 9, 8)), [5, 7], [1, 1], [2, 3]),
    pooled("larger", of((1, 2, 36, 33)), [33, 32], [3, 32]),
    Case("max-indices", aten.max_pool2d_with_indices.default, (X, [3, 2], [2, 2], [1, 1])),
    meant("plain", X, [2, 2]),
    meant("overlapping", X, [3, 2], [1, 2]),
    meant("apart", of((1, 2, 7, 7)), [2, 1], [3, 4]),
    meant("padded", X, [3, 3], [2, 2], [1, 1]),
    meant("padding-left-out", X, [3, 3], [2, 2], [1, 1], True, False),
    meant("ceil", of((1, 2, 6, 5)), [3, 3], [2, 2], [1, 1], True),
    meant("divisor", X, [3, 3], [2, 2], [1, 1], False, True, 5),
    meant("of-one-image", of((3, 5, 6)), [2, 2]),
    meant("one-channel", of((2, 1, 7, 5)), [3, 3], [2, 2], [1, 1]),
    meant("many-channels", of((1, 70, 3, 4)), [2, 2], [1, 1]),
    meant("large", of((1, 3, 9, 8)), [5, 7], [1, 1], [2, 3], False, False),
    divided("one", X, [1, 1]),
    divided("even", of((1, 3, 4, 6)), [2, 3]),
    divided("uneven", X, [3, 4]),
    divided("larger", of((1, 2, 3, 2)), [5, 7]),
    divided("of-one-image", of((3, 5, 6)), [2, 2]),
    divided("plane", of((2, 5, 21, 21)), [1, 1]),
    divided("large-plane", of((1, 2, 36, 33)), [1, 1]),
    divided("large-and-uneven", of((1, 3, 13, 11)), [2, 3]),
    Case("adaptive-private", aten._adaptive_avg_pool2d.default, (X, [2, 2])),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> torch.device:
    monkeypatch.setattr(Pool, "_on_gpu", lambda self, value: self.fits_kernels)
    return running.device()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_map(case: Case) -> None:
    longest = math.prod(case.args[0].shape[-2:])
    small = math.prod(case.args[0].shape) < 200
    for layout, tasks in (("plain", 1), ("strided", 3), ("expanded", 2))[: 3 if small else 1]:
        run, wide = runs(case, layout, tasks=tasks)
        with running.reversed_programs():
            check(run.maps(), wide.expected(), longest, DIVISION)
        assert run.op.backend == "triton"


@pytest.mark.parametrize("case", [CASES[0], *CASES[-4:-2]], ids=str)
def test_missing_cotangents(case: Case) -> None:
    longest = math.prod(case.args[0].shape[-2:])
    run, wide = runs(case)
    for d, d_dot in ((True, False), (False, True)):
        given = [([one.d_y[0] if d else None], [one.d_y_dot[0] if d_dot else None]) for one in (run, wide)]
        check(run.maps(None, *given[0]), wide.expected(None, *given[1]), longest, DIVISION)


def operation(kind: type[Pool], target: torch._ops.OpOverload, x: Tensor, *window: object) -> Pool:
    return kind(Call.example(target, x[0], *window))


@pytest.mark.parametrize(
    "window",
    [
        (12, [2, 2]),
        (12, [3, 3], [2, 2], [1, 1]),
        (9, [2, 2], [1, 1], [1, 1], [2, 2]),
        (9, [5, 5], [1, 1], [2, 2]),
        (36, [33, 32], [3, 4]),
    ],
    ids=str,
)
def test_maxima_lie_where_pytorch_has_them(window) -> None:
    """Ties, windows without a finite number, and windows with several NaN, bit for bit."""
    side, *window = window
    x = torch.randint(3, (2, 1, 3, side, side - 1)).float()
    x[0, 0, 0] = -math.inf
    x[0, 0, 1, 3 : side // 2, 1:6] = math.nan
    x[1, 0, 0, ::7, ::5] = math.nan
    x[1, 0, 1] = math.inf
    for target in (aten.max_pool2d.default, aten.max_pool2d_with_indices.default):
        op = operation(MaxPool, target, x, *window)
        with running.reversed_programs():
            outputs, (where,) = op.forward([x.to(running.device())])
        want, position = aten.max_pool2d_with_indices(x.flatten(0, 1), *window)
        assert torch.equal(outputs[0].cpu().flatten(0, 1).nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(outputs[0].cpu().flatten(0, 1).isnan(), want.isnan())
        assert torch.equal(where.cpu().long(), position)
        assert where.dtype == (torch.int32 if len(outputs) == 1 else torch.int64)
        if len(outputs) == 2:
            assert outputs[1].dtype == torch.int64
            assert torch.equal(outputs[1].cpu().flatten(0, 1), position)


def test_a_window_without_a_pixel_gives_and_takes_nothing() -> None:
    """A dilated window may reach over an image on both sides."""
    from fastmeta.ops.pool import triton

    window = Window((2, 2), (1, 1), (2, 2), (3, 3))
    x = torch.ones(1, 1, 1, 1, device=running.device())
    y, i = triton.maximum(x, window, (2, 2), torch.int32)
    assert (y == -math.inf).all()
    assert not triton.maximum_tangent(x, i).any()
    assert not triton.maximum_transpose(torch.ones_like(y), i, window, x.shape).any()


def test_results_keep_channels_last() -> None:
    x = torch.randn(5, 2, 3, 4, 4, device=running.device())
    for op in (
        operation(MaxPool, aten.max_pool2d.default, x, [2, 2]),
        operation(AveragePool, aten.avg_pool2d.default, x, [2, 2]),
        operation(AdaptiveAveragePool, aten.adaptive_avg_pool2d.default, x, [3, 3]),
    ):
        (y,), saved = op.forward([x])
        (d_x,) = op.backward(saved, (y,), [Need.TASK])
        (y_dot,), _ = op.tangent(saved, (d_x,))
        for value in (y, d_x, y_dot):
            assert value.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_transposes_are_transposes_to_the_last_bit() -> None:
    """Of small integers, whose sums round nothing: ``<L x, d> = <x, L^T d>`` over many windows that overlap."""
    from fastmeta.ops.pool import triton

    window, there = Window((3, 3), (1, 2), (1, 1)), running.device()
    x, v = (
        torch.randint(-9, 10, (2, 4, 9, 11), device=there).float().to(memory_format=torch.channels_last) for _ in "xv"
    )
    y, i = triton.maximum(x, window, (9, 6), torch.int32)
    d = torch.randint(-9, 10, y.shape, device=there).float().to(memory_format=torch.channels_last)
    pushed, pulled = triton.maximum_tangent(v, i), triton.maximum_transpose(d, i, window, x.shape)
    assert (pushed * d).sum() == (pulled * v).sum() != 0
    pushed = triton.average(v, window, True, 1, (9, 6))
    pulled = triton.average_transpose(d, window, True, 1, x.shape)
    assert (pushed * d).sum() == (pulled * v).sum() != 0


def test_positions_of_other_kernels_will_do() -> None:
    """PyTorch's int64 positions are read as well as int32 ones."""
    from fastmeta.ops.pool import triton

    window = Window((2, 2), (1, 1), (0, 0))
    x, v = (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last) for _ in "xv")
    _, i = reference.maximum(x, window)
    got = triton.maximum_tangent(v.to(running.device()), i.to(running.device()))
    assert torch.equal(got.cpu(), reference.maximum_tangent(v, i))


def test_images_beyond_int32_are_pytorchs() -> None:
    def fits(shape: tuple[int, ...], size: list[int]) -> bool:
        x = torch.empty(shape, device="meta")
        return AdaptiveAveragePool(Call.example(aten.adaptive_avg_pool2d.default, x, size)).fits_kernels

    side = 1 << 13
    assert fits((1, LARGEST // side**2, side, side), [1, 1])
    assert not fits((1, LARGEST // side**2 + 1, side, side), [1, 1])
    assert not fits((1, 1, 1, 1 << 16), [1, 1 << 15])


def test_no_tasks() -> None:
    x = torch.zeros(1, 2, 3, 4, 4, device=running.device())
    for op in (
        operation(MaxPool, aten.max_pool2d.default, x, [2, 2]),
        operation(AveragePool, aten.avg_pool2d.default, x, [2, 2]),
        operation(AdaptiveAveragePool, aten.adaptive_avg_pool2d.default, x, [2, 2]),
    ):
        (y,), saved = op.forward([x[:0]])
        (d_x,) = op.backward(saved, (y,), [Need.TASK])
        (y_dot,), _ = op.tangent(saved, (x[:0],))
        assert d_x.shape == (0, 2, 3, 4, 4)
        assert y.shape == y_dot.shape == (0, 2, 3, 2, 2)


def test_a_cpu_runs_the_reference(monkeypatch) -> None:
    monkeypatch.undo()
    x = torch.randn(2, 1, 3, 4, 4)
    op = operation(MaxPool, aten.max_pool2d.default, x, [2, 2])
    _, (where,) = op.forward([x])
    assert op.backend == "reference"
    assert where.dtype == torch.int64


def test_tiles_of_large_windows_read_several_pixels_at_a_time() -> None:
    from fastmeta.ops.pool import triton

    for pixels, channels in ((4, 64), (441, 64), (7056, 64), (441, 1), (49, 5), (None, 7)):
        tile = triton._tiles(10_000, channels, pixels)
        lanes = tile.get("BK", 1)
        assert tile["BM"] * lanes * tile["BC"] == triton.ELEMENTS
        assert lanes == {None: 1, 4: 1, 49: 32, 441: 32, 7056: 128}[pixels]


def test_builds_name_every_argument() -> None:
    from fastmeta.ops.pool import triton

    builds = triton.shipped()
    assert len({build.name for build in builds}) == len(builds)
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in builds)

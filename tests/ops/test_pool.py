"""Pooling: windows that tile, overlap, miss the border or are cut by it; adaptive bins of unequal size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.pool import MaxPool
from tests.ops import four_maps
from tests.ops.four_maps import A, Case

aten = torch.ops.aten
max_pool = aten.max_pool2d.default
average = aten.avg_pool2d.default
adaptive = aten.adaptive_avg_pool2d.default


def image(*shape: int) -> A:
    return A(shape, "spread")


CASES = [
    Case("max-2x2", max_pool, (image(3, 2, 4, 4), [2, 2])),
    Case("max-odd", max_pool, (image(2, 2, 5, 7), [2, 2], [2, 2])),
    Case("max-overlap", max_pool, (image(2, 3, 6, 5), [3, 3], [2, 1], [1, 1])),
    Case("max-gaps", max_pool, (image(2, 1, 7, 7), [2, 2], [3, 3])),
    Case("max-dilated", max_pool, (image(1, 2, 7, 7), [2, 2], [2, 2], [0, 0], [2, 2])),
    Case("max-ceil", max_pool, (image(2, 2, 5, 5), [2, 2], [2, 2], [0, 0], [1, 1], True)),
    Case("average", average, (image(2, 3, 4, 6), [2, 2])),
    Case("average-padded", average, (image(2, 2, 5, 5), [3, 3], [2, 2], [1, 1], False, False)),
    Case("average-divisor", average, (image(1, 2, 4, 4), [2, 2], [1, 1], [0, 0], False, True, 3)),
    Case("global", adaptive, (image(2, 3, 4, 5), [1, 1])),
    Case("adaptive", adaptive, (image(2, 2, 7, 5), [3, 2])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@given(
    sides=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    channels=st.integers(1, 3),
)
def test_drawn_windows(sides, kernel, stride, channels):
    four_maps.check(Case("drawn", max_pool, (image(2, channels, *sides), [kernel] * 2, [stride] * 2)))
    four_maps.check(Case("drawn", average, (image(2, channels, *sides), [kernel] * 2, [stride] * 2)))


def test_a_tie_goes_to_the_same_pixel_in_every_map():
    op = MaxPool(CASES[0].call(torch.float64))
    x = torch.zeros(2, 3, 2, 4, 4, dtype=torch.float64)
    _, saved = op.forward([x])
    (d_x,) = op.backward(saved, (torch.ones(2, 3, 2, 2, 2).double(),), [Need.TASK])
    (y_dot,), _ = op.tangent(saved, (d_x,))
    assert torch.equal(y_dot, torch.ones_like(y_dot))
    assert d_x.sum() == y_dot.numel()


def test_an_image_without_batch_axis_is_refused():
    with pytest.raises(Unsupported, match="without batch axis"):
        MaxPool(Call.example(max_pool, torch.randn(2, 4, 4), [2, 2]))

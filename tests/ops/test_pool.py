"""Pooling."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.generic import GenericOp
from fastmeta.ops.pool import MaxPool
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

aten = torch.ops.aten
# Spread: windows have one clear maximum, so float32 and float64 choose the same.
X = A((2, 3, 5, 6), "spread")

CASES = [
    Case("max", aten.max_pool2d.default, (X, [2, 2])),
    Case("max-square", aten.max_pool2d.default, (X, [2])),
    Case("max-overlapping", aten.max_pool2d.default, (X, [3, 3], [2, 1], [1, 1])),
    Case("max-dilated", aten.max_pool2d.default, (X, [2, 2], [1, 1], [0, 0], [2, 2])),
    Case("max-ceil", aten.max_pool2d.default, (X, [2, 4], [2, 4], [0, 0], [1, 1], True)),
    Case("max-of-one-image", aten.max_pool2d.default, (A((3, 5, 6), "spread"), [2, 2])),
    Case("max-indices", aten.max_pool2d_with_indices.default, (X, [2, 2])),
    Case("average", aten.avg_pool2d.default, (X, [2, 2])),
    Case("average-padded", aten.avg_pool2d.default, (X, [3, 3], [2, 2], [1, 1], True, False)),
    Case("average-divisor", aten.avg_pool2d.default, (X, [3, 3], [2, 2], [1, 1], False, True, 5)),
    Case("average-of-one-image", aten.avg_pool2d.default, (A((3, 5, 6)), [2, 2])),
    Case("adaptive-one", aten.adaptive_avg_pool2d.default, (X, [1, 1])),
    Case("adaptive", aten.adaptive_avg_pool2d.default, (X, [3, 4])),
    Case("adaptive-private", aten._adaptive_avg_pool2d.default, (X, [2, 2])),
    Case("adaptive-of-one-image", aten.adaptive_avg_pool2d.default, (A((3, 5, 6)), [2, 2])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    images=st.integers(1, 3),
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tasks=st.integers(1, 3),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_windows(images, channels, size, kernel, stride, tasks, layout):
    x = A((images, channels, *size), "spread")
    for target in (aten.max_pool2d.default, aten.avg_pool2d.default):
        four_maps.check(Case("drawn", target, (x, list(kernel), list(stride))), tasks=tasks, layout=layout)


def test_a_tie_is_broken_once_and_as_torch_does():
    case = Case("ties", aten.max_pool2d.default, (A((1, 1, 4, 4)), [2, 2]))
    run = Run(case)
    run.x = [torch.zeros(3, 1, 1, 4, 4, dtype=torch.float64)]
    run.truth = four_maps.Truth(case, run.call, run.x, 3)
    compare(run.maps(), run.expected(), four_maps.FLOAT64_BOUND, "ties")


def test_results_keep_channels_last():
    op = MaxPool(Call.example(aten.max_pool2d.default, torch.zeros(2, 3, 4, 4), [2, 2]))
    (y,), saved = op.forward([torch.randn(5, 2, 3, 4, 4)])
    (d_x,) = op.backward(saved, (y,), [Need.TASK])
    (y_dot,), _ = op.tangent(saved, (d_x,))
    for value in (y, d_x, y_dot):
        assert value.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_integers_are_refused():
    with pytest.raises(Unsupported, match="input must be floating"):
        MaxPool(Call.example(aten.max_pool2d.default, torch.zeros(1, 1, 2, 2, dtype=torch.int64), [2, 2]))

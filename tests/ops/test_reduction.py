"""Sums and means over axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Unsupported
from fastmeta.ops.generic import GenericOp
from fastmeta.ops.reduction import Reduction
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

aten = torch.ops.aten
X = A((4, 3, 2))

CASES = [
    Case("sum", aten.sum.default, (X,)),
    Case("sum-of-a-scalar", aten.sum.default, (A(()),)),
    Case("sum-some", aten.sum.dim_IntList, (X, [0, -1])),
    Case("sum-kept", aten.sum.dim_IntList, (X, [1], True)),
    Case("sum-all-by-none", aten.sum.dim_IntList, (X, None)),
    Case("sum-all-by-empty", aten.sum.dim_IntList, (X, [])),
    Case("mean", aten.mean.default, (X,)),
    Case("mean-of-a-scalar", aten.mean.dim, (A(()), [0])),
    Case("mean-some", aten.mean.dim, (X, [1, 2])),
    Case("mean-kept", aten.mean.dim, (X, [-3], True)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    target=st.sampled_from([aten.sum.dim_IntList, aten.mean.dim]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    keepdim=st.booleans(),
    tasks=st.integers(1, 3),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_axes(target, shape, data, keepdim, tasks, layout):
    dims = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    four_maps.check(Case("drawn", target, (A(shape), dims, keepdim)), tasks=tasks, layout=layout)


def test_a_change_of_dtype_is_refused():
    with pytest.raises(Unsupported, match=r"of torch\.int64 to torch\.float32"):
        Reduction(Call.example(aten.mean.default, torch.tensor([1, 2]), dtype=torch.float32))

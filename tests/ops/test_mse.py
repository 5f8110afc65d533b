"""Mean squared error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Unsupported
from fastmeta.ops.generic import GenericOp
from fastmeta.ops.mse import MSE
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

mse = torch.ops.aten.mse_loss.default

CASES = [Case(f"{shape}-{r}", mse, (A(shape), A(shape), r)) for shape in [(4, 3), (5,), (), (1, 1)] for r in (0, 1, 2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    reduction=st.integers(0, 2),
    tasks=st.integers(1, 4),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_shapes(shape, reduction, tasks, layout):
    four_maps.check(Case("drawn", mse, (A(shape), A(shape), reduction)), tasks=tasks, layout=layout)


def test_unequal_shapes_or_dtypes_are_refused():
    with pytest.raises(Unsupported, match="must agree"):
        MSE(Call.example(mse, torch.ones(3, 1), torch.ones(3, 1).double()))

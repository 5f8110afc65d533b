"""Linear: four maps on every shape a model may give it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.linear import Linear
from tests.ops import four_maps
from tests.ops.four_maps import A, Case

linear = torch.ops.aten.linear.default

CASES = [
    Case("plain", linear, (A((4, 3)), A((5, 3)), A((5,)))),
    Case("no-bias", linear, (A((4, 3)), A((5, 3)), None)),
    Case("one-sample", linear, (A((1, 1)), A((1, 1)), A((1,)))),
    Case("a-vector", linear, (A((3,)), A((5, 3)), A((5,)))),
    Case("tokens", linear, (A((2, 3, 7)), A((5, 7)), A((5,)))),
    Case("many-tokens", linear, (A((2, 3, 2, 7)), A((4, 7)), None)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    shares = ("weight",) if case.args[2] is None else ("weight", "bias")
    four_maps.check_all(case, shares)


@given(
    tasks=st.integers(1, 4),
    rows=st.lists(st.integers(1, 5), max_size=3),
    fan_in=st.integers(1, 9),
    fan_out=st.integers(1, 9),
    bias=st.booleans(),
    shared=st.sampled_from([(), ("weight",), ("bias",), ("weight", "bias")]),
    need=st.sampled_from([Need.SHARED, Need.TASK]),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_shapes(tasks, rows, fan_in, fan_out, bias, shared, need, layout):
    case = Case("drawn", linear, (A((*rows, fan_in)), A((fan_out, fan_in)), A((fan_out,)) if bias else None))
    shared = tuple(s for s in shared if bias or s == "weight")
    four_maps.check(case, tasks=tasks, shared=shared, need=need, layout=layout)


def test_flops():
    assert Linear(CASES[0].call(torch.float32)).flops() == 2 * 4 * 3 * 5


def test_a_weight_that_is_not_a_matrix_is_refused():
    call = Call.example(linear, torch.randn(3, 4), torch.randn(4))
    with pytest.raises(Unsupported, match="weight must be a matrix"):
        Linear(call)

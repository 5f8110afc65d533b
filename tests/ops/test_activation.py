"""Activations: values, derivatives, and the points where a derivative jumps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.activation import Activation
from fastmeta.ops.generic import GenericOp
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

aten = torch.ops.aten
# Spread: no value within rounding of a kink, so float32 and float64 are on the same side of it.
X = A((5, 7), "spread")

CASES = [
    Case("relu", aten.relu.default, (X,)),
    Case("relu6", aten.relu6.default, (A((5, 7), "spread", shift=2.0),)),
    Case("leaky", aten.leaky_relu.default, (X, 0.2)),
    Case("hardtanh", aten.hardtanh.default, (X, -0.505, 0.7003)),
    Case("tanh", aten.tanh.default, (X,)),
    Case("sigmoid", aten.sigmoid.default, (X,)),
    Case("silu", aten.silu.default, (X,)),
    Case("gelu", aten.gelu.default, (X,)),
    Case("gelu-tanh", aten.gelu.default, (X,), {"approximate": "tanh"}),
    Case("elu", aten.elu.default, (X, 0.7)),
    Case("selu", aten.selu.default, (X,)),
    Case("softplus", aten.softplus.default, (X, 2.0, 1.5)),
    Case("abs", aten.abs.default, (X,)),
    Case("exp", aten.exp.default, (X,)),
    Case("sin", aten.sin.default, (X,)),
    Case("cos", aten.cos.default, (X,)),
    Case("square", aten.square.default, (X,)),
    *(Case(f"power-{p}", aten.pow.Tensor_Scalar, (X, p)) for p in (0, 1, 2, 3)),
]
P = A((5, 7), "positive")
AWAY_FROM_ZERO = [
    Case("log", aten.log.default, (P,)),
    Case("sqrt", aten.sqrt.default, (P,)),
    Case("rsqrt", aten.rsqrt.default, (P,)),
    Case("reciprocal", aten.reciprocal.default, (A((5, 7), "nonzero"),)),
    *(Case(f"power-{p}", aten.pow.Tensor_Scalar, (P, p)) for p in (-1, 0.5, 1.7)),
]


@pytest.mark.parametrize("case", CASES + AWAY_FROM_ZERO, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES + AWAY_FROM_ZERO, ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    case=st.sampled_from(CASES),
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    tasks=st.integers(1, 4),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_shapes(case, shape, tasks, layout):
    drawn = Case(case.name, case.target, (A(shape, "spread"), *case.args[1:]), case.kwargs)
    four_maps.check(drawn, tasks=tasks, layout=layout)


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "exp"], ids=str)
def test_large_inputs_stay_finite(case):
    op = Activation(case.call(torch.float32))
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    (y,), saved = op.forward([x])
    one = (torch.ones_like(x),)
    y_dot, saved_dot = op.tangent(saved, one)
    results = (y, *y_dot, *op.tangent_backward(saved, saved_dot, one, one, [Need.TASK]))
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kink_takes_the_side_that_torch_takes(case):
    run = Run(case)
    run.x[0] = torch.tensor([0.0, 6.0, -0.505, 0.7003, 0.75, -0.0, 0.0], dtype=torch.float64).expand(3, 5, 7)
    run.truth = four_maps.Truth(case, run.call, run.x, 3)
    compare(run.maps(), run.expected(), four_maps.FLOAT64_BOUND, str(case))


def test_integers_are_refused():
    with pytest.raises(Unsupported, match="input must be floating"):
        Activation(Call.example(aten.relu.default, torch.tensor([1])))

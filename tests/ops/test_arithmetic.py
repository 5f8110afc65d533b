"""Elementwise arithmetic: numbers, tensors, broadcasting, dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.arithmetic import Product, Quotient, Sum
from fastmeta.ops.generic import GenericOp
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

aten = torch.ops.aten
X, ROW, ONE, SCALAR = A((4, 3)), A((3,)), A((4, 1)), A(())
DIVISOR = A((4, 3), "nonzero")

CASES = [
    Case("add", aten.add.Tensor, (X, X)),
    Case("add-alpha", aten.add.Tensor, (X, X), {"alpha": -2}),
    Case("add-row", aten.add.Tensor, (X, ROW)),
    Case("add-to-row", aten.add.Tensor, (ROW, X), {"alpha": 3}),
    Case("add-both-broadcast", aten.add.Tensor, (ONE, ROW)),
    Case("add-a-scalar-tensor", aten.add.Tensor, (SCALAR, X)),
    Case("add-number", aten.add.Tensor, (X, 3)),
    Case("add-number-alpha", aten.add.Scalar, (X, 3, 0.5)),
    Case("sub", aten.sub.Tensor, (X, ROW)),
    Case("sub-number", aten.sub.Tensor, (X, 2.5)),
    Case("sub-scalar", aten.sub.Scalar, (X, 2.5, 2)),
    Case("rsub", aten.rsub.Tensor, (X, ROW), {"alpha": 2}),
    Case("rsub-number", aten.rsub.Scalar, (X, 2.5, 2)),
    Case("neg", aten.neg.default, (X,)),
    Case("mul", aten.mul.Tensor, (X, X)),
    Case("mul-row", aten.mul.Tensor, (X, ROW)),
    Case("mul-both-broadcast", aten.mul.Tensor, (ONE, ROW)),
    Case("mul-a-scalar-tensor", aten.mul.Tensor, (X, SCALAR)),
    Case("mul-number", aten.mul.Tensor, (X, 3)),
    Case("mul-scalar", aten.mul.Scalar, (X, 0.3)),
    Case("div", aten.div.Tensor, (X, DIVISOR)),
    Case("div-row", aten.div.Tensor, (X, A((3,), "nonzero"))),
    Case("div-of-row", aten.div.Tensor, (ROW, DIVISOR)),
    Case("div-number", aten.div.Tensor, (X, 3)),
    Case("div-scalar", aten.div.Scalar, (X, 0.3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    target=st.sampled_from([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor]),
    shape=st.lists(st.integers(1, 4), max_size=4),
    ones=st.lists(st.booleans(), min_size=4, max_size=4),
    dropped=st.integers(0, 4),
    swapped=st.booleans(),
    tasks=st.integers(1, 3),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_broadcasts(target, shape, ones, dropped, swapped, tasks, layout):
    small = tuple(1 if one else n for n, one in zip(shape, ones, strict=False))[dropped:]
    shapes = (small, tuple(shape)) if swapped else (tuple(shape), small)
    four_maps.check(Case("drawn", target, (A(shapes[0]), A(shapes[1], "nonzero"))), tasks=tasks, layout=layout)


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor], ids=str)
def test_mixed_dtypes_promote_as_one_task_does(target):
    call = Call.example(target, torch.ones(3), torch.tensor(2.0, dtype=torch.float64))
    op = {aten.add.Tensor: Sum, aten.mul.Tensor: Product, aten.div.Tensor: Quotient}[target](call)
    x = [torch.ones(2, 3), torch.full((2,), 2.0, dtype=torch.float64)]
    (y,), saved = op.forward(x)
    assert y.dtype is torch.float32
    d = op.backward(saved, (y,), [Need.TASK, Need.TASK])
    assert [v.dtype for v in d] == [torch.float32, torch.float64]
    y_dot, saved_dot = op.tangent(saved, tuple(x))
    d_dot = op.tangent_backward(saved, saved_dot, (y,), (y,), [Need.TASK, Need.TASK])
    assert [v.dtype for v in (y_dot[0], *d_dot)] == [torch.float32, torch.float32, torch.float64]


def test_an_integer_factor_gets_no_cotangent():
    op = Product(Call.example(aten.mul.Tensor, torch.ones(3), torch.tensor([1, 2, 3])))
    _, saved = op.forward([torch.ones(2, 3), torch.tensor([[1, 2, 3]] * 2)])
    d_x, d_n = op.backward(saved, (torch.ones(2, 3),), [Need.TASK, Need.TASK])
    assert d_x.tolist() == [[1, 2, 3]] * 2
    assert d_n is None


@pytest.mark.parametrize(
    ("op", "target", "args", "want"),
    [
        (Sum, aten.add.Tensor, (torch.tensor(3), 1), [4, 4]),
        (Sum, aten.rsub.Scalar, (torch.tensor(3), 1, 2), [-5, -5]),
        (Product, aten.mul.Tensor, (torch.tensor(3), torch.tensor(2)), [6, 6]),
        (Quotient, aten.div.Tensor, (torch.tensor(3), torch.tensor(2)), [1.5, 1.5]),
    ],
)
def test_integers_carry_no_derivative(op, target, args, want):
    call = Call.example(target, *args)
    numbers = [a.expand(2) for a in args if isinstance(a, torch.Tensor)]
    (y,), saved = op(call).forward(numbers)
    assert y.tolist() == want
    assert y.dtype is target(*args).dtype
    nothing = (None,) * len(numbers)
    assert op(call).tangent(saved, nothing)[0] == (None,)
    assert op(call).backward(saved, (torch.ones(2),), [Need.TASK] * len(numbers)) == nothing


def test_truth_values_are_refused():
    with pytest.raises(Unsupported, match="must be of real numbers"):
        Sum(Call.example(aten.add.Tensor, torch.tensor(True), torch.tensor(False)))

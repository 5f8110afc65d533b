"""Views: linear rearrangements and their transposes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.generic import GenericOp
from fastmeta.ops.views import View
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

aten = torch.ops.aten
X = A((4, 3, 5))
LAST = 9223372036854775807

CASES = [
    Case("view", aten.view.default, (X, [4, -1])),
    Case("reshape", aten.reshape.default, (X, [2, 30])),
    Case("unsafe-view", aten._unsafe_view.default, (X, [12, 5])),
    Case("flatten", aten.flatten.using_ints, (X, 1)),
    Case("unflatten", aten.unflatten.int, (X, 0, [2, 2])),
    Case("unsqueeze", aten.unsqueeze.default, (X, -1)),
    Case("squeeze", aten.squeeze.default, (A((1, 3, 1)),)),
    Case("squeeze-one", aten.squeeze.dim, (A((1, 3, 1)), -1)),
    Case("squeeze-some", aten.squeeze.dims, (A((1, 3, 1)), [0, -1])),
    Case("transpose", aten.transpose.int, (X, 0, -1)),
    Case("transpose-a-scalar", aten.transpose.int, (A(()), 0, -1)),
    Case("permute", aten.permute.default, (X, [2, -3, 1])),
    Case("t", aten.t.default, (A((4, 3)),)),
    Case("t-of-a-vector", aten.t.default, (A((4,)),)),
    Case("expand", aten.expand.default, (A((3, 1)), [2, -1, 4])),
    Case("expand-a-scalar", aten.expand.default, (A(()), [2, 3])),
    Case("expand-to-itself", aten.expand.default, (X, [4, 3, 5])),
    Case("broadcast-to", aten.broadcast_to.default, (A((3, 1)), [3, 4])),
    Case("broadcast-tensors", aten.broadcast_tensors.default, ([A((3, 1)), A((2,))],), outputs=(0, 1)),
    Case("slice", aten.slice.Tensor, (X, 1, 1, LAST)),
    Case("slice-back", aten.slice.Tensor, (X, -1, -4, -1, 2)),
    Case("slice-all", aten.slice.Tensor, (X, 0)),
    Case("select", aten.select.int, (X, 1, -1)),
    Case("flip", aten.flip.default, (X, [0, -1])),
    Case("pad", aten.pad.default, (X, [1, 2, 0, 1])),
    Case("crop", aten.constant_pad_nd.default, (X, [-1, 2])),
    Case("cat", aten.cat.default, ([A((2, 3)), A((1, 3)), A((4, 3))],)),
    Case("cat-last", aten.cat.default, ([A((2, 3)), A((2, 1))], -1)),
    Case("stack", aten.stack.default, ([A((2, 3)), A((2, 3))], -1)),
    Case("split", aten.split.Tensor, (X, 2, 1), outputs=(0, 1)),
    Case("split-sizes", aten.split_with_sizes.default, (X, [1, 4], -1), outputs=(0, 1)),
    Case("chunk", aten.chunk.default, (X, 3), outputs=(0, 1)),
    Case("unbind", aten.unbind.int, (X, 1), outputs=(0, 1, 2)),
    Case("clone", aten.clone.default, (X,), {"memory_format": torch.contiguous_format}),
    Case("contiguous", aten.contiguous.default, (X,)),
    Case("alias", aten.alias.default, (X,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ("flatten", "unflatten")], ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    tasks=st.integers(1, 3),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_slices_and_orders(shape, data, tasks, layout):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    step = data.draw(st.integers(1, 3))
    order = data.draw(st.permutations(range(len(shape))))
    for case in (
        Case("slice", aten.slice.Tensor, (A(shape), dim, start, LAST, step)),
        Case("select", aten.select.int, (A(shape), dim, start)),
        Case("permute", aten.permute.default, (A(shape), list(order))),
        Case("cat", aten.cat.default, ([A(shape), A(shape)], dim)),
        Case("unbind", aten.unbind.int, (A(shape), dim), outputs=tuple(range(shape[dim]))),
    ):
        four_maps.check(case, tasks=tasks, layout=layout)


@pytest.mark.parametrize("target", [aten.detach.default, aten.detach_copy.default], ids=str)
def test_detach_blocks_tangents_and_cotangents(target):
    op, x = View(Call.example(target, torch.ones(3))), torch.ones(2, 3)
    (y,), saved = op.forward([x])
    assert torch.equal(x, y)
    assert op.tangent(saved, (x,))[0] == (None,)
    assert op.backward(saved, (x,), [Need.TASK]) == (None,)
    assert op.tangent_backward(saved, (), (x,), (x,), [Need.TASK]) == (None,)


def test_a_cast_takes_cotangents_back_to_the_dtype_of_the_input():
    op, x = View(Call.example(aten._to_copy.default, torch.ones(3), dtype=torch.float64)), torch.ones(2, 3)
    (y,), saved = op.forward([x])
    assert y.dtype is op.tangent(saved, (x,))[0][0].dtype is torch.float64
    assert op.backward(saved, (y,), [Need.TASK])[0].dtype is torch.float32


def test_integers_pass_without_tangents():
    op, x = View(Call.example(aten.view.default, torch.tensor([1, 2]), [2, 1])), torch.tensor([[1, 2], [3, 4]])
    assert op.forward([x])[0][0].tolist() == [[[1], [2]], [[3], [4]]]
    assert op.tangent((), (None,))[0] == (None,)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "reason"),
    [
        (aten.pad.default, (torch.ones(3), [1, 1], "constant", 2.0), {}, "border must be of zeros"),
        (aten.pad.default, (torch.ones(1, 3), [1, 1], "reflect"), {}, "border must be of zeros"),
        (aten.cat.default, ([torch.ones(2, 2), torch.ones(0)],), {}, "different rank"),
        (aten.cat.default, ([torch.ones(2), torch.ones(2).double()],), {}, "different dtypes"),
        (aten._to_copy.default, (torch.ones(2),), {"device": "cpu"}, "another device"),
    ],
)
def test_what_it_refuses(target, args, kwargs, reason):
    with pytest.raises(Unsupported, match=reason):
        View(Call.example(target, *args, **kwargs))

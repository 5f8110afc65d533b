"""The generic operation: four maps of any ATen overload."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.generic import GenericOp
from tests.ops.four_maps import FLOAT64_BOUND, LAYOUTS, A, Case, Run, check, check_missing, compare

aten = torch.ops.aten

CASES = [
    Case("mul", aten.mul.Tensor, (A((2, 3)), A((3,)))),
    Case("log-sum-exp", aten.logsumexp.default, (A((2, 3)), [1])),
    Case("softplus", aten.softplus.default, (A((5,)),)),
    Case("mish", aten.mish.default, (A((5,)),)),
    Case("cat", aten.cat.default, ([A((2, 3)), A((1, 3))], 0)),
    Case("split", aten.split.Tensor, (A((5, 3)), 2), outputs=(0, 1, 2)),
    Case("maximum-with-index", aten.max.dim, (A((4, 3), "spread"), 1)),
    Case("gather", aten.gather.default, (A((4, 3)), 1, A((4, 2), "classes", 3))),
    Case("index", aten.index.Tensor, (A((4, 3)), [A((5,), "classes", 4)])),
    Case("norm", aten.linalg_vector_norm.default, (A((4, 3)),)),
    Case("cumprod", aten.cumprod.default, (A((4, 3)), 0)),
    Case("where", aten.where.self, (A((4, 3), "bool"), A((4, 3)), A((4, 3)))),
    Case("group-norm", aten.group_norm.default, (A((2, 4, 3)), 2, A((4,)), A((4,)))),
    Case("conv1d", aten.conv1d.default, (A((2, 3, 8)), A((4, 3, 3)), A((4,)))),
    Case("transposed", aten.conv_transpose2d.input, (A((2, 3, 4, 4)), A((3, 2, 3, 3)), A((2,)))),
    Case("matrix-exponential", aten.linalg_matrix_exp.default, (A((3, 3)),)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    for layout in LAYOUTS:
        check(case, op=GenericOp, layout=layout)
    check(case, op=GenericOp, tasks=1)
    check_missing(case, op=GenericOp)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reverse_mode_alone(case, monkeypatch):
    whole = GenericOp.__init__

    def without_forward_mode(self, call):
        whole(self, call)
        self.forward_mode = False

    monkeypatch.setattr(GenericOp, "__init__", without_forward_mode)
    check(case, op=GenericOp)


def test_attention_takes_the_kernel_that_has_a_second_derivative():
    q = A((1, 2, 3, 4))
    case = Case("attention", aten.scaled_dot_product_attention.default, (q, q, q))
    got = Run(case, op=GenericOp).maps()
    with sdpa_kernel(SDPBackend.MATH):
        compare(got, Run(case, op=GenericOp).expected(), FLOAT64_BOUND, "attention")


def test_an_overload_without_a_batching_rule_is_quiet():
    case = Case("bincount-like", aten.histc.default, (A((6,)), 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(case, op=GenericOp).op.forward([torch.rand(3, 6, dtype=torch.float64)])


def test_integers_carry_no_tangent():
    call = Call.example(aten.add.Tensor, torch.tensor(3), 1)
    op = GenericOp(call)
    (y,), saved = op.forward([torch.tensor([3, 4])])
    assert y.tolist() == [4, 5]
    assert op.tangent(saved, (None,))[0] == (None,)
    assert op.backward(saved, (None,), [Need.TASK]) == (None,)


def test_draws_differ_between_tasks_and_are_constants():
    op = GenericOp(Call.example(aten.rand_like.default, torch.zeros(50)))
    (y,), saved = op.forward([torch.zeros(50).expand(2, 50)])
    assert op.random
    assert not torch.equal(y[0], y[1])
    assert saved == ()
    assert op.tangent(saved, (torch.ones(2, 50),))[0] == (None,)
    assert op.backward(saved, (torch.ones(2, 50),), [Need.TASK]) == (None,)
    assert op.tangent_backward(saved, (None,), (y,), (y,), [Need.TASK]) == (None,)


def test_a_seed_repeats_a_draw():
    op = GenericOp(Call.example(aten.bernoulli.p, torch.zeros(50), 0.5))
    torch.manual_seed(3)
    first = op.forward([torch.zeros(2, 50)])[0][0]
    torch.manual_seed(3)
    assert torch.equal(first, op.forward([torch.zeros(2, 50)])[0][0])


@pytest.mark.parametrize(
    ("target", "args", "reason"),
    [
        (aten.native_dropout.default, (torch.ones(3), 0.5, True), "draws random numbers inside a differentiable"),
        (aten.scaled_dot_product_attention.default, (*[torch.ones(1, 1, 2, 2)] * 3, None, 0.1), "draws random"),
        (aten.rand.default, ([3],), "draws without a tensor"),
        (aten.add_.Tensor, (torch.ones(3), 1), "writes into its arguments"),
        (aten.view_as_complex.default, (torch.ones(3, 2),), "complex"),
    ],
)
def test_what_it_refuses(target, args, reason):
    with pytest.raises(Unsupported, match=reason):
        GenericOp(Call.example(target, *args))


def test_dropout_at_rest_is_not_random():
    attention = Call.example(aten.scaled_dot_product_attention.default, *[torch.ones(1, 1, 2, 2)] * 3)
    assert not GenericOp(attention).random
    lstm = nn.LSTM(2, 2)
    weights = list(lstm.parameters())
    hidden = [torch.zeros(1, 1, 2)] * 2
    call = Call.example(aten.lstm.input, torch.ones(3, 1, 2), hidden, weights, True, 1, 0.5, False, False, False)
    assert not GenericOp(call).random

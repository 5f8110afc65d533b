"""Dropout: an independent mask a task, the right rate, and one mask in all four maps."""

from __future__ import annotations

import pytest
import torch

from fastmeta.core.task_op import Call, Need
from fastmeta.ops.dropout import Dropout

native_dropout = torch.ops.aten.native_dropout.default


def build(p: float, train: bool = True) -> Dropout:
    return Dropout(Call.example(native_dropout, torch.randn(50, 40), p, train))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_scale_and_independence(p):
    x = torch.ones(3, 50, 40)
    (y, kept), _ = build(p).forward([x])
    assert torch.equal(y != 0, kept)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    # 2000 draws a task: five standard deviations of the share kept
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert not torch.equal(kept[0], kept[1])


def test_the_mask_is_replayed():
    op = build(0.5)
    assert op.random
    x = torch.randn(3, 50, 40).expand(3, 50, 40)
    (y, _), (mask,) = op.forward([x])
    v = torch.randn_like(y)
    for got in (
        op.backward((mask,), (v, None), [Need.TASK])[0],
        op.tangent((mask,), (v,))[0][0],
        op.tangent_backward((mask,), (), (v, None), (v, None), [Need.TASK])[0],
    ):
        assert torch.equal(got, v * mask)
    assert torch.equal(y, x * mask)
    assert op.tangent_backward((mask,), (), (v, None), (None, None), [Need.TASK]) == (None,)


@pytest.mark.parametrize(("p", "train"), [(0.5, False), (0.0, True)])
def test_nothing_is_dropped_outside_training_or_at_rate_zero(p, train):
    op = build(p, train)
    x = torch.randn(2, 50, 40)
    (y, kept), saved = op.forward([x])
    assert not op.random
    assert torch.equal(y, x)
    assert kept.all()
    assert op.backward(saved, (x, None), [Need.TASK])[0] is x


def test_rate_one_drops_everything():
    (y, kept), _ = build(1.0).forward([torch.randn(2, 50, 40)])
    assert not kept.any()
    assert y.abs().max() == 0

"""Cross-entropy's Triton kernels against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastmeta.ops.cross_entropy import reference
from fastmeta.ops.cross_entropy.reference import MEAN, SUM, Kept
from tests.kernels.running import device, reversed_programs

EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("tasks", "rows", "classes", "reduction", "smoothing", "ignored"),
    [
        (1, 1, 1, MEAN, 0.0, -100),
        (3, 5, 5, MEAN, 0.0, -100),
        (2, 40, 20, SUM, 0.0, -100),
        (2, 7, 33, MEAN, 0.1, 2),
    ],
)
def test_forward_and_tangent(tasks, rows, classes, reduction, smoothing, ignored, nan_poison):
    there = device()
    from fastmeta.ops.cross_entropy import triton

    z, z_dot = (3 * torch.randn(tasks, rows, classes) for _ in range(2))
    labels = torch.randint(classes, (tasks, rows))
    labels[0, 0] = ignored if rows > 1 else labels[0, 0]
    mask = labels != ignored
    want, kept = reference.forward(z.double(), labels.where(mask, 0), mask, None, reduction, smoothing)
    with reversed_programs():
        loss, got = triton.forward(z.to(there), labels.to(there), ignored, reduction, smoothing)
        loss_dot, moved = triton.tangent(got, z_dot.to(there))
    bound = EPS * (8 + 4 * math.sqrt(rows * classes))  # exp, log and division round a few times, sums at random
    want_dot, want_moved = reference.tangent(kept, z_dot.double(), reduction)
    pairs = [(loss, want), (got.g, kept.g), (got.p, kept.p), (moved, want_moved), (loss_dot, want_dot)]
    for a, b in pairs:
        assert (a.cpu().double() - b).norm() <= bound * max(b.norm(), want.norm())
    assert torch.allclose(got.sr.cpu().double().expand_as(kept.sr), kept.sr, rtol=EPS, atol=0)


def test_labels_out_of_range_make_the_loss_of_their_task_nan():
    there = device()
    from fastmeta.ops.cross_entropy import triton

    z, labels = torch.randn(3, 2, 4), torch.tensor([[0, 1], [4, 0], [0, -1]])
    loss, _ = triton.forward(z.to(there), labels.to(there), -100, MEAN, 0.0)
    assert loss.isnan().tolist() == [False, True, True]


def test_a_task_without_rows_that_count_has_no_mean():
    there = device()
    from fastmeta.ops.cross_entropy import triton

    z, labels = torch.randn(1, 2, 4), torch.full((1, 2), -100)
    loss, kept = triton.forward(z.to(there), labels.to(there), -100, MEAN, 0.0)
    assert loss.isnan().all()
    loss, kept = triton.forward(z.to(there), labels.to(there), -100, SUM, 0.0)
    assert loss.item() == 0
    assert not Kept(*kept).g.any()

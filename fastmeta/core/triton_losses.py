"""Softmax cross-entropy of tiles of logits in Triton."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_that_count(labels, R, ignored, BR: tl.constexpr):
    """How many of ``R`` labels are not the ignored one."""
    count = tl.zeros((BR,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        y = tl.load(labels + r, r < R, 0)
        count += tl.where((r < R) & (y != ignored), 1.0, 0.0)
    return tl.sum(count, 0)


@triton.jit
def cross_entropy(x, y, c, C, smoothing):
    """Loss of each row of logits, NaN where its label is none of ``C`` classes; ``softmax x``; ``q``, its target."""
    inside = (c < C)[None, :]
    top = tl.max(tl.where(inside, x, -float("inf")), 1)
    e = tl.where(inside, tl.exp(x - top[:, None]), 0.0)
    whole = tl.sum(e, 1)
    share = e / whole[:, None]
    log_share = tl.where(inside, x - top[:, None] - tl.log(whole)[:, None], 0.0)
    q = tl.where(c[None, :] == y[:, None], 1.0 - smoothing, 0.0) + smoothing / C
    row = -tl.sum(q * log_share, 1)
    return tl.where((y < 0) | (y >= C), float("nan"), row), share, q


@triton.jit
def cross_entropy_dot(x_dot, share, factor):
    """``factor p_dot``, of rows whose probabilities are ``share``."""
    mean = tl.sum(share * x_dot, 1)
    return factor[:, None] * share * (x_dot - mean[:, None])

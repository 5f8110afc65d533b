"""The inner step and its adjoint in plain torch: differentiable to any order, traceable, and the truth in float64.

``segments`` holds the offsets of the packed tensors (``core/segments.py``).
"""

from __future__ import annotations

from torch import Tensor

from fastmeta.core.segments import collect, spread


def step(
    theta: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # [S + 1]
) -> Tensor:  # [T, P]
    """``phi[t, p] = theta[t, p] - alpha[a(p)] * g[t, p]``, eq. (3)."""
    return theta - spread(alpha, segments, g.shape[-1]) * g


def adjoint(
    lam: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # [S + 1]
    need_alpha: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [T, P], alpha's shape
    """``u = alpha * lam``, eq. (5), and ``d_alpha = -sum_t g * lam`` summed to alpha's shape, eq. (7)."""
    u = scale(lam, alpha, segments)
    return u, -collect(g, lam, alpha, segments) if need_alpha else None


def scale(
    lam: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # [S + 1]
) -> Tensor:  # [T, P]
    """``u = alpha * lam``, eq. (5)."""
    return spread(alpha, segments, lam.shape[-1]) * lam

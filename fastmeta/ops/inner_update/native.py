"""Calls of the C++ kernels: float32 and float64 on a CPU, not differentiable by themselves.

Rows may lie any distance apart, zero included (parameters that all tasks share, ``theta.expand(T, P)``); the elements
of a row must be contiguous. The results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import checks, native
from fastmeta.core.packed_rows import rate, read, vector, written

OP = "inner_update"


def step(
    theta: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    *,
    out: Tensor | None = None,  # [T, P]
) -> Tensor:  # [T, P]
    """Eq. (3) into ``out``, or into a new tensor. ``out`` may be ``theta`` or ``g`` itself."""
    extension = native.require(OP)
    shape, dtype = g.shape, g.dtype
    theta_row, g_row = read(OP, "theta", theta, shape, dtype), read(OP, "g", g, shape, dtype)
    rates = rate(OP, alpha, segments, dtype)
    if out is None:
        out = torch.empty_like(g, memory_format=torch.contiguous_format)
        out_row = shape[1]
    else:
        out_row = written(OP, "out", out, shape, dtype)
    extension.inner_update_step(
        dtype is torch.float64,
        *shape,
        theta.data_ptr(),
        theta_row,
        g.data_ptr(),
        g_row,
        *rates,
        out.data_ptr(),
        out_row,
        torch.get_num_threads(),
    )
    return out


def adjoint(
    lam: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    need_alpha: bool = True,
    *,
    out: tuple[Tensor, Tensor | None] | None = None,  # [T, P], alpha's shape
) -> tuple[Tensor, Tensor | None]:
    """Eq. (5) and, where ``need_alpha``, eq. (7), into ``out`` or into new tensors. ``u`` may be ``lam`` itself."""
    extension = native.require(OP)
    shape, dtype = g.shape, g.dtype
    lam_row, g_row = read(OP, "lam", lam, shape, dtype), read(OP, "g", g, shape, dtype)
    rates = rate(OP, alpha, segments, dtype)
    if out is None:
        u = torch.empty_like(g, memory_format=torch.contiguous_format)
        u_row = shape[1]
        d_alpha = torch.empty_like(alpha) if need_alpha else None
    else:
        u, d_alpha = out
        u_row = written(OP, "out[0]", u, shape, dtype)
        if need_alpha != (d_alpha is not None):
            wanted = "a tensor, since d_alpha is wanted" if need_alpha else "None, since d_alpha is not wanted"
            checks.fail(TypeError, OP, "out[1]", wanted, type(d_alpha).__name__)
        if d_alpha is not None:
            checks.shape(OP, "out[1]", d_alpha, alpha.shape)
            vector(OP, "out[1]", d_alpha, dtype)
    extension.inner_update_adjoint(
        dtype is torch.float64,
        *shape,
        lam.data_ptr(),
        lam_row,
        g.data_ptr(),
        g_row,
        *rates,
        u.data_ptr(),
        u_row,
        0 if d_alpha is None else d_alpha.data_ptr(),
        torch.get_num_threads(),
    )
    return u, d_alpha

"""Calls of the C++ kernels: float32 and float64 on a CPU, not differentiable by themselves.

Rows may lie any distance apart, zero included (parameters that all tasks share, ``theta.expand(T, P)``); the elements
of a row must be contiguous. The results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import checks, native
from fastmeta.core.dispatch import Backend

OP = "inner_update"
DTYPES = (torch.float32, torch.float64)
CONTIGUOUS = "make it so with .contiguous()"


def backend(device: torch.device | None = None, dtype: torch.dtype | None = None) -> Backend:
    """Whether the kernels can run tensors of this device and dtype (``None``: some device, some dtype)."""
    extension = native.extension()
    if extension is None:
        return Backend("native", False, native.missing_reason())
    if device is not None and device.type != "cpu":
        return Backend("native", False, f"runs on cpu, not on {device.type}")
    if dtype is not None and dtype not in DTYPES:
        return Backend("native", False, f"has float32 and float64, not {checks.dtype_name(dtype)}")
    return Backend("native", True, f"C++, instruction set {extension.instruction_set()}")


def runs(x: Tensor) -> bool:
    """Whether the kernels can run on ``x``: what :func:`backend` says, for the hot path."""
    return x.is_cpu and x.dtype in DTYPES and native.extension() is not None


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
    theta_row, g_row = _row("theta", theta, shape, dtype), _row("g", g, shape, dtype)
    rate = _rate(alpha, segments, dtype)
    if out is None:
        out = torch.empty_like(g, memory_format=torch.contiguous_format)
        out_row = shape[1]
    else:
        out_row = _written("out", out, shape, dtype)
    extension.inner_update_step(
        dtype is torch.float64,
        *shape,
        theta.data_ptr(),
        theta_row,
        g.data_ptr(),
        g_row,
        *rate,
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
    lam_row, g_row = _row("lam", lam, shape, dtype), _row("g", g, shape, dtype)
    rate = _rate(alpha, segments, dtype)
    if out is None:
        u = torch.empty_like(g, memory_format=torch.contiguous_format)
        u_row = shape[1]
        d_alpha = torch.empty_like(alpha) if need_alpha else None
    else:
        u, d_alpha = out
        u_row = _written("out[0]", u, shape, dtype)
        if need_alpha != (d_alpha is not None):
            wanted = "a tensor, since d_alpha is wanted" if need_alpha else "None, since d_alpha is not wanted"
            checks.fail(TypeError, OP, "out[1]", wanted, type(d_alpha).__name__)
        if d_alpha is not None:
            checks.shape(OP, "out[1]", d_alpha, alpha.shape)
            _vector("out[1]", d_alpha, dtype)
    extension.inner_update_adjoint(
        dtype is torch.float64,
        *shape,
        lam.data_ptr(),
        lam_row,
        g.data_ptr(),
        g_row,
        *rate,
        u.data_ptr(),
        u_row,
        0 if d_alpha is None else d_alpha.data_ptr(),
        torch.get_num_threads(),
    )
    return u, d_alpha


def _row(name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> int:
    """Distance between the rows of ``x``; raises unless it is a matrix of this shape and dtype the kernels can read."""
    if x.shape == shape and x.dtype is dtype and dtype in DTYPES and x.is_cpu and len(shape) == 2:
        row, column = x.stride()
        if column == 1 or shape[1] <= 1:
            return row
        checks.fail(ValueError, OP, name, "contiguous along its last axis", f"strides {list(x.stride())}", CONTIGUOUS)
    checks.device(OP, name, x, torch.device("cpu"), "the native kernels' device")
    checks.shape(OP, name, x, shape if len(shape) == 2 else ("T", "P"))
    if dtype not in DTYPES:
        checks.fail(TypeError, OP, name, "float32 or float64 for the native kernels", checks.dtype_name(x.dtype))
    checks.dtype(OP, name, x, dtype, "that of g")
    return x.stride(0)


def _written(name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> int:
    row = _row(name, x, shape, dtype)
    if shape[0] > 1 and row < shape[1]:
        checks.fail(ValueError, OP, name, "free of overlapping rows", f"strides {list(x.stride())}")
    return row


def _vector(name: str, x: Tensor, dtype: torch.dtype) -> None:
    checks.device(OP, name, x, torch.device("cpu"), "the native kernels' device")
    checks.dtype(OP, name, x, dtype, "that of g")
    if x.dim() > 1:
        checks.fail(ValueError, OP, name, "of shape [], [1], [S] or [P]", list(x.shape))
    if not x.is_contiguous():
        checks.fail(ValueError, OP, name, "contiguous", f"strides {list(x.stride())}", CONTIGUOUS)


def _rate(alpha: Tensor, segments: Tensor | None, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Addresses and sizes of ``alpha`` and ``segments``; the caller keeps both alive during the kernel."""
    if alpha.dtype is not dtype or alpha.dim() > 1 or not alpha.is_cpu or not alpha.is_contiguous():
        _vector("alpha", alpha, dtype)
    if segments is None:
        return alpha.data_ptr(), alpha.numel(), 0, 0
    if segments.dtype is not torch.int64 or segments.dim() != 1 or not segments.is_cpu or not segments.is_contiguous():
        checks.dtype(OP, "segments", segments, torch.int64)
        checks.shape(OP, "segments", segments, ("S + 1",))
        checks.device(OP, "segments", segments, torch.device("cpu"), "the native kernels' device")
        checks.fail(ValueError, OP, "segments", "contiguous", f"strides {list(segments.stride())}", CONTIGUOUS)
    offsets = segments.numel()
    if offsets == 0:
        checks.fail(ValueError, OP, "segments", "S + 1 offsets", "none")
    return alpha.data_ptr(), alpha.numel(), segments.data_ptr(), offsets - 1

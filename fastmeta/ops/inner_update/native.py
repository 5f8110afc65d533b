"""Calls of the C++ kernels: float32 and float64 on a CPU, not differentiable by themselves.

Rows may lie any distance apart, zero included (parameters that all tasks share, ``theta.expand(T, P)``); the elements
of a row must be contiguous. The results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import checks, native
from fastmeta.core.dispatch import Backend

DTYPES = (torch.float32, torch.float64)


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


def step(
    theta: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    *,
    out: Tensor | None = None,  # [T, P]
) -> Tensor:  # [T, P]
    """Eq. (3) into ``out``, or into a new tensor. ``out`` may be ``theta`` or ``g`` itself."""
    T, P = g.shape
    if out is None:
        out = torch.empty((T, P), dtype=g.dtype)
    rate, offsets = _rate("inner_update", alpha, segments, g)
    native.require("inner_update").inner_update_step(
        g.dtype is torch.float64,
        T,
        P,
        *_rows("theta", theta, g),
        *_rows("g", g, g),
        *rate,
        *_rows("out", out, g, written=True),
        torch.get_num_threads(),
    )
    del offsets  # kept alive until the kernel has read it
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
    raise NotImplementedError

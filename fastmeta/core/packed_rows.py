"""Packed parameters ``[T, P]`` and their rates, as the C++ kernels that go element by element read them.

Rows may lie any distance apart, zero included (parameters that all tasks share, ``theta.expand(T, P)``); the elements
of a row must be contiguous. Kernels take addresses: every function here checks what it gives one of, and raises with
the operation's name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import checks, native
from fastmeta.core.dispatch import Backend

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


def read(op: str, name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> int:
    """Distance between the rows of ``x``; raises unless it is a matrix of this shape and dtype the kernels can read."""
    if x.shape == shape and x.dtype is dtype and dtype in DTYPES and x.is_cpu and len(shape) == 2:
        row, column = x.stride()
        if column == 1 or shape[1] <= 1:
            return row
        checks.fail(ValueError, op, name, "contiguous along its last axis", f"strides {list(x.stride())}", CONTIGUOUS)
    checks.device(op, name, x, torch.device("cpu"), "the native kernels' device")
    checks.shape(op, name, x, shape if len(shape) == 2 else ("T", "P"))
    if dtype not in DTYPES:
        checks.fail(TypeError, op, name, "float32 or float64 for the native kernels", checks.dtype_name(x.dtype))
    checks.dtype(op, name, x, dtype, "that of g")
    return x.stride(0)


def written(op: str, name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> int:
    """The same for a matrix that a kernel writes, whose rows must not overlap."""
    row = read(op, name, x, shape, dtype)
    if shape[0] > 1 and row < shape[1]:
        checks.fail(ValueError, op, name, "free of overlapping rows", f"strides {list(x.stride())}")
    return row


def vector(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raise unless ``x`` is a contiguous vector, or a number, of this dtype on a CPU."""
    checks.device(op, name, x, torch.device("cpu"), "the native kernels' device")
    checks.dtype(op, name, x, dtype, "that of g")
    if x.dim() > 1:
        checks.fail(ValueError, op, name, "of shape [], [1], [S] or [P]", list(x.shape))
    if not x.is_contiguous():
        checks.fail(ValueError, op, name, "contiguous", f"strides {list(x.stride())}", CONTIGUOUS)


def rate(op: str, alpha: Tensor, segments: Tensor | None, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Addresses and sizes of ``alpha`` and ``segments``; the caller keeps both alive during the kernel."""
    if alpha.dtype is not dtype or alpha.dim() > 1 or not alpha.is_cpu or not alpha.is_contiguous():
        vector(op, "alpha", alpha, dtype)
    if segments is None:
        return alpha.data_ptr(), alpha.numel(), 0, 0
    if segments.dtype is not torch.int64 or segments.dim() != 1 or not segments.is_cpu or not segments.is_contiguous():
        checks.dtype(op, "segments", segments, torch.int64)
        checks.shape(op, "segments", segments, ("S + 1",))
        checks.device(op, "segments", segments, torch.device("cpu"), "the native kernels' device")
        checks.fail(ValueError, op, "segments", "contiguous", f"strides {list(segments.stride())}", CONTIGUOUS)
    offsets = segments.numel()
    if offsets == 0:
        checks.fail(ValueError, op, "segments", "S + 1 offsets", "none")
    return alpha.data_ptr(), alpha.numel(), segments.data_ptr(), offsets - 1

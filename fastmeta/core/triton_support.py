"""Triton: whether its kernels can run here, how precisely they multiply, and which builds of them are shipped."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from fastmeta.core.dispatch import Backend

CAPABILITY = (8, 0)  # the oldest GPUs whose tensor cores multiply float32 operands
# PyTorch's own names (``torch.set_float32_matmul_precision``) for what a float32 product is made of: three tf32
# products with float32's accuracy, one, or one of bfloat16 operands. Sums are float32 always.
PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "bf16"}


@dataclass(frozen=True)
class Shipped:
    """One build of a kernel that calls can ask for, so that its resources can be read without a GPU.

    Attributes:
        name: unique among all builds.
        kernel: the ``triton.jit`` function.
        signature: Triton's type of each argument by name: ``"*fp32"``, ``"i32"``, ``"constexpr"``, or a tuple of such.
        constants: values of the ``constexpr`` arguments.
        num_warps, num_stages: of the launch.
        tensor_cores: whether it must use them.
        capabilities: compute capabilities, ten times, of the GPUs it is for.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    tensor_cores: bool = False
    capabilities: tuple[int, ...] = (80, 90)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of a CPU (``TRITON_INTERPRET=1``, for tests)."""
    if not _installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


_passed_over: ContextVar[bool] = ContextVar("fastmeta_triton_passed_over", default=False)


@contextmanager
def without() -> Iterator[None]:
    """Within it no kernel runs in this thread, so that operations can be compared with their references."""
    token = _passed_over.set(True)
    try:
        yield
    finally:
        _passed_over.reset(token)


def missing_reason(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel can run tensors of this device and dtype; empty where they can."""
    if _passed_over.get():
        return "Triton kernels are passed over, for a comparison"
    if device.type != "cuda" and not interpreted():
        return f"Triton kernels need a GPU, got tensors on {device}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    if not _installed():
        return "triton is not installed; pip install 'fastmeta[gpu]'"
    if dtype != torch.float32:
        return f"Triton kernels compute in float32, got {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton kernels need compute capability 8.0, got {major}.{minor}"
    return ""


def backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The row of an operation's table of backends."""
    reason = missing_reason(device, dtype)
    return Backend("triton", not reason, reason or ("interpreter" if interpreted() else "tensor cores"))


def precision() -> str:
    """How products of float32 operands are made, by what the user asked PyTorch for; see :data:`PRECISIONS`."""
    return PRECISIONS[torch.get_float32_matmul_precision()]


def build_precision() -> str:
    """:func:`precision` as kernels take it (:mod:`fastmeta.core.triton_dot`).

    The interpreter cannot multiply bfloat16, and rounds operands instead: ``"bf16 rounded"``. Its other products are of
    float32, in one part.
    """
    if interpreted():
        return "bf16 rounded" if precision() == "bf16" else "ieee"
    return precision()


def turned_precision() -> str:
    """:func:`build_precision` of products whose operands do not lie along what is summed over.

    Tensor cores read bfloat16 from shared memory either way, tf32 one way alone: so float32's accuracy is had by six
    products of three bfloat16 parts each, and not by three of tf32 parts.
    """
    chosen = build_precision()
    return "bf16x6" if chosen == "tf32x3" else chosen


def exact_precision() -> str:
    """Likewise of those that must have float32's accuracy whatever the user asked for."""
    return "ieee" if interpreted() else "bf16x6"

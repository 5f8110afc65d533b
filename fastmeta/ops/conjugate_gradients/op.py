"""Conjugate gradients as the engine calls them: where they begin, an iteration, and who computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.dispatch import Backend, select
from fastmeta.ops.conjugate_gradients import reference
from fastmeta.ops.conjugate_gradients.state import State

OP = "conjugate_gradients"


def backends(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[Backend, ...]:
    """The implementations, best first, and whether each can run tensors of this device and dtype."""
    if device is not None and device.type != "cuda":
        kernels = Backend("triton", False, f"runs on cuda, not on {device.type}")
    else:
        kernels = triton_support.backend(device or torch.device("cuda"), dtype or torch.float32)
    return kernels, Backend("reference", True, "torch")


def start(b: Tensor, tolerance: float) -> State:
    """Before the first iteration: ``v = 0`` for the systems ``A v = b``, ``b`` ``[T, P]``.

    Args:
        b: right-hand sides; a task whose is zero has ended.
        tolerance: share of ``|b|`` at which a residual is small enough.
    """
    square = (b * b).sum(1)
    enough = square * tolerance**2
    active = square > enough
    ended = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    r, p = (b.clone(memory_format=torch.contiguous_format) for _ in range(2))
    return State(torch.zeros_like(r), r, p, square, enough, active, torch.ones_like(active), ended)


def advance(state: State, product: Tensor, shift: float) -> None:
    """One iteration of every task that goes on, for ``A = B + s``.

    Args:
        state: before and after.
        product: ``B p`` of the state's ``p``, ``[T, P]``.
        shift: ``s``.
    """
    if select(OP, backends(product.device, product.dtype)) == "reference":
        reference.advance(state, product, shift)
        return
    from fastmeta.ops.conjugate_gradients import triton

    triton.advance(state, product, shift)

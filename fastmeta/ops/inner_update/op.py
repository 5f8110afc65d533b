"""The inner update as a user and the engine call it: checks, choice of backend, differentiation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastmeta.core import checks
from fastmeta.core.dispatch import Backend, select
from fastmeta.ops.inner_update import native, reference

_PLAIN = (Tensor, Parameter)


def backends(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[Backend, ...]:
    """The implementations, best first, and whether each can run tensors of this device and dtype."""
    return native.backend(device, dtype), Backend("reference", True, "torch")


def choose(backend: str | None, theta: Tensor) -> str:
    """Name of the backend that a call on ``theta`` gets.

    Raises:
        RuntimeError: ``backend`` was asked for and cannot run here; the message says why.
    """
    return select("inner_update", backends(theta.device, theta.dtype), backend)


def step(theta: Tensor, g: Tensor, alpha: Tensor, segments: Tensor | None = None) -> Tensor:
    """Eq. (3) on packed tensors, for callers that differentiate by themselves.

    Shapes are those of :func:`inner_update`; not differentiable.
    """
    _no_graph(theta, g, alpha)
    if _native_runs(g):
        return native.step(theta, g, alpha, segments)
    return reference.step(theta, g, alpha, segments)


def adjoint(
    lam: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    need_alpha: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [T, P], alpha's shape
    """Adjoint of one step for the cotangent ``lam`` of its result, for callers that differentiate by themselves.

    Returns:
        ``u = alpha * lam``, eq. (5), whose negative is the cotangent of ``g``, and
        ``d_alpha = -sum_t g * lam`` summed to alpha's shape, eq. (7) (``None`` unless ``need_alpha``).
        Not differentiable.
    """
    _no_graph(lam, g, alpha)
    if _native_runs(g):
        return native.adjoint(lam, g, alpha, segments, need_alpha)
    return reference.adjoint(lam, g, alpha, segments, need_alpha)


def _native_runs(x: Tensor) -> bool:
    return False


def _no_graph(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "inner_update: the entry points step and adjoint must be called without a graph to record, got an input "
            "that requires grad; call inner_update, or wrap the call in torch.no_grad()"
        )


def inner_update(
    theta: Tensor,  # [T, P]
    grad: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    *,
    backend: str | None = None,
) -> Tensor:
    """One inner step."""
    return reference.step(theta, grad, alpha, segments)

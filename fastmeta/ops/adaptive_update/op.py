"""The adaptive update as the engine calls it: choice of backend, for callers that differentiate by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import packed_rows
from fastmeta.core.dispatch import Backend
from fastmeta.ops.adaptive_update import native, reference
from fastmeta.ops.adaptive_update.form import Adjoint, Coefficients, Form, State

OP = native.OP


def backends(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[Backend, ...]:
    """The implementations, best first, and whether each can run tensors of this device and dtype."""
    return packed_rows.backend(device, dtype), Backend("reference", True, "torch")


def step(
    form: Form,
    phi: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    state: State,
    c: Coefficients,
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
) -> tuple[Tensor, State]:  # [T, P]
    """One step of every task's packed parameters, eq. (19) of docs/maths.md, in one pass.

    Args:
        form: which moments there are.
        phi: parameters; rows may lie any distance apart.
        g: gradient of the support loss, of phi's dtype and device.
        state: of the step before.
        c: numbers of the step.
        alpha: learning rate: one for all, one a tensor (with ``segments``), or one an element.
        segments: offsets of the packed tensors, and P at the end.

    Returns:
        The parameters and the state after the step, new tensors.

    Raises:
        RuntimeError: autograd would record the call; :func:`fastmeta.ops.adaptive_update.reference.step` is
            differentiable.
        TypeError, ValueError: a dtype, a shape or a device does not fit.
    """
    _refuse_graph(phi, g, *state, *c, alpha)
    run = native.step if packed_rows.runs(g) else reference.step
    return run(form, phi, g, state, c, alpha, segments)


def adjoint(
    form: Form,
    lam: Tensor,  # [T, P]
    d_after: State,
    phi: Tensor | None,  # [T, P]
    g: Tensor,  # [T, P]
    before: State,
    c: Coefficients,
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    need_numbers: bool = True,
) -> Adjoint:
    """Adjoint of one step, eq. (20) and (21) of docs/maths.md, in one pass.

    Args:
        form: as in :func:`step`.
        lam: cotangent of the parameters after the step.
        d_after: cotangents of its state.
        phi: parameters before it; ``None`` where it has neither ``decay`` nor ``shrink``.
        g: as there.
        before: its state.
        c: as there.
        alpha: as there.
        segments: as there.
        need_numbers: whether the gradients to alpha and to the coefficients are wanted.

    Raises:
        As :func:`step`.
    """
    _refuse_graph(lam, *d_after, phi, g, *before, *c, alpha)
    run = native.adjoint if packed_rows.runs(g) else reference.adjoint
    return run(form, lam, d_after, phi, g, before, c, alpha, segments, need_numbers)


def _refuse_graph(*inputs: object) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise RuntimeError(
            f"{OP}: the entry points step and adjoint are not differentiable, got an input that requires grad while "
            "autograd records; call reference.step instead, or wrap the call in torch.no_grad()"
        )

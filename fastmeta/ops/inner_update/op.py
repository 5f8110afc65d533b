"""The inner update as a user and the engine call it: checks, choice of backend, differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmeta.core import checks, packed_rows, triton_support
from fastmeta.core.dispatch import Backend, select
from fastmeta.ops.inner_update import native, reference
from fastmeta.ops.inner_update.function import Step, rows

OP = native.OP


def backends(device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[Backend, ...]:
    """The implementations, best first, and whether each can run tensors of this device and dtype."""
    if device is not None and device.type != "cuda":
        gpu = Backend("triton", False, f"runs on cuda, not on {device.type}")
    else:
        gpu = triton_support.backend(device or torch.device("cuda"), dtype or torch.float32)
    return packed_rows.backend(device, dtype), gpu, Backend("reference", True, "torch")


def step(
    theta: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    out: Tensor | None = None,  # [T, P]
) -> Tensor:  # [T, P]
    """``phi[t, p] = theta[t, p] - alpha[a(p)] * g[t, p]``, eq. (3), for callers that differentiate by themselves.

    The result is written to ``out`` where it is given, which may be columns of a wider tensor. Raises ``RuntimeError``
    where autograd would record the call: :func:`inner_update` is the differentiable function.
    """
    if torch.is_grad_enabled() and (theta.requires_grad or g.requires_grad or alpha.requires_grad):
        _refuse_graph()
    if packed_rows.runs(g):
        return native.step(theta, g, alpha, segments, out=out)
    if _on_gpu(g):
        from fastmeta.ops.inner_update import triton

        return triton.step(rows(theta), rows(g), alpha.contiguous(), segments, out=out)
    phi = reference.step(theta, g, alpha, segments)
    return phi if out is None else out.copy_(phi)


def adjoint(
    lam: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    need_alpha: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [T, P], alpha's shape
    """Adjoint of one step for the cotangent ``lam`` of its result, for callers that differentiate by themselves.

    Returns:
        ``u = alpha * lam``, eq. (5), whose negative is the cotangent of ``g``; and
        ``d_alpha = -sum_t g * lam`` summed to alpha's shape, eq. (7), ``None`` unless ``need_alpha``.

    Raises:
        RuntimeError: autograd would record the call.
    """
    if torch.is_grad_enabled() and (lam.requires_grad or g.requires_grad or alpha.requires_grad):
        _refuse_graph()
    if packed_rows.runs(g):
        return native.adjoint(lam, g, alpha, segments, need_alpha)
    if _on_gpu(g):
        from fastmeta.ops.inner_update import triton

        return triton.adjoint(rows(lam), rows(g), alpha.contiguous(), segments, need_alpha)
    return reference.adjoint(lam, g, alpha, segments, need_alpha)


def inner_update(
    theta: Tensor,  # [T, P] or [P]
    grad: Tensor,  # [T, P] or [P]
    alpha: Tensor | float,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    *,
    backend: str | None = None,
) -> Tensor:  # [T, P] or [P]
    """One SGD step of the packed parameters of every task.

    ``phi[t, p] = theta[t, p] - alpha[a(p)] * grad[t, p]``, eq. (3) of docs/maths.md. The parameters of a task lie side
    by side in a row; ``a(p)`` is 0 for one learning rate, the number of p's tensor for one a tensor, p for one an
    element.

    Differentiable to any order in ``theta``, ``grad`` and ``alpha``, by autograd and by ``torch.func`` (``grad``,
    ``jvp``, ``vmap`` and what is composed of them). Under ``torch.compile`` it is the plain expression, which the
    compiler fuses itself.

    Args:
        theta: parameters, floating point; ``[P]`` beside a ``grad`` of ``[T, P]`` is shared by all tasks. Rows may lie
            any distance apart (``theta.expand(T, P)`` costs nothing).
        grad: gradient of the support loss, of theta's dtype and device.
        alpha: learning rate of theta's dtype and device: one for all, one a tensor (with ``segments``), or one an
            element. A float is taken as one for all.
        segments: offsets at which the packed tensors begin, and P at the end: ``[0, n_0, n_0 + n_1, ..., P]``.
        backend: ``"native"`` (C++; float32 and float64 on a CPU), ``"triton"`` (float32 on a GPU) or ``"reference"``
            (torch); ``None`` takes the first that can run the call.

    Returns:
        The updated parameters, a new tensor of grad's shape.

    Raises:
        TypeError: an argument is no tensor, or its dtype does not fit.
        ValueError: a shape, a device or the offsets do not fit, or no backend has that name.
        RuntimeError: the requested backend cannot run the call; the message says why.
    """
    alpha = _check(theta, grad, alpha, segments)
    if torch.compiler.is_compiling():
        if backend not in (None, "reference"):
            raise RuntimeError(f"{OP}: backend {backend!r} is not available under torch.compile; leave backend out")
        return reference.step(theta, grad, alpha, segments)
    table = backends(grad.device, grad.dtype)
    if select(OP, table, backend) == "reference":
        return reference.step(theta, grad, alpha, segments)
    g = rows(grad if grad.dim() == 2 else grad.unsqueeze(0))
    phi: Tensor = Step.apply(rows(theta.expand_as(g)), g, alpha.contiguous(), segments)
    return phi if grad.dim() == 2 else phi.squeeze(0)


def takes_parts(phi: Tensor) -> bool:
    """Whether :func:`step_parts` runs beside ``phi``, ``[T, P]``: on a GPU in float32."""
    return _on_gpu(phi)


def step_parts(
    theta: Tensor,  # [T, P]
    parts: Sequence[Tensor],  # [T, n] each, P elements a task in all
    alpha: Tensor | None = None,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1], at which the parts begin
    *,
    out: Tensor,  # [T, P]; may be theta
) -> Tensor:  # [T, P]
    """Eq. (3) into ``out`` of gradients that lie by themselves, where :func:`takes_parts`; a rate left out is 1."""
    from fastmeta.ops.inner_update import triton

    return triton.step_parts(theta, parts, None if alpha is None else alpha.contiguous(), segments, out=out)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and not triton_support.missing_reason(x.device, x.dtype)


def _refuse_graph() -> None:
    raise RuntimeError(
        f"{OP}: the entry points step and adjoint are not differentiable, got an input that requires grad while "
        "autograd records; call inner_update instead, or wrap the call in torch.no_grad()"
    )


def _check(theta: object, grad: object, alpha: object, segments: object) -> Tensor:
    """Raise unless the arguments fit together; return ``alpha`` as a tensor."""
    theta = checks.tensor(OP, "theta", theta)
    grad = checks.tensor(OP, "grad", grad)
    checks.floating(OP, "theta", theta)
    if isinstance(alpha, (int, float)):
        alpha = torch.tensor(alpha, dtype=theta.dtype, device=theta.device)
    alpha = checks.tensor(OP, "alpha", alpha)
    for name, x in (("grad", grad), ("alpha", alpha)):
        checks.dtype(OP, name, x, theta.dtype, "that of theta")
        checks.device(OP, name, x, theta.device, "that of theta")
    if grad.dim() not in (1, 2):
        checks.fail(ValueError, OP, "grad", "of shape [T, P] or [P]", list(grad.shape))
    P = grad.shape[-1]
    if tuple(theta.shape) not in (tuple(grad.shape), (P,)):
        wanted = f"of shape {list(grad.shape)}" + (f" or [{P}]" if grad.dim() == 2 else "")
        checks.fail(ValueError, OP, "theta", wanted, list(theta.shape))
    sizes = {"[]": (), "[1]": (1,), f"[{P}]": (P,)}
    if segments is not None:
        S = _check_segments(checks.tensor(OP, "segments", segments), theta, P)
        sizes[f"[{S}]"] = (S,)
    if tuple(alpha.shape) not in sizes.values():
        mend = "" if segments is not None else "one entry a tensor needs segments"
        checks.fail(ValueError, OP, "alpha", "of shape " + ", ".join(sizes), list(alpha.shape), mend)
    return alpha


def _check_segments(segments: Tensor, theta: Tensor, P: int) -> int:
    """Raise unless ``segments`` are offsets into a row of P; return how many tensors they part."""
    checks.dtype(OP, "segments", segments, torch.int64)
    if segments.dim() != 1 or segments.shape[0] == 0:
        checks.fail(ValueError, OP, "segments", "of shape [S + 1]", list(segments.shape))
    if segments.device.type != "cpu":
        checks.device(OP, "segments", segments, theta.device, "that of theta, or cpu")
    elif not torch.compiler.is_compiling():
        offsets = segments.tolist()
        if offsets[0] != 0 or offsets[-1] != P or offsets != sorted(offsets):
            checks.fail(ValueError, OP, "segments", f"offsets that rise from 0 to P = {P}", offsets)
    return segments.shape[0] - 1

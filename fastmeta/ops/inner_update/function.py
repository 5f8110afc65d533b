"""Differentiation of the native kernels: two functions whose derivatives are made of themselves.

With E the map that gives every parameter its entry of alpha, and R its transpose (a sum over tasks and over what shares
an entry)::

    step(theta, g, alpha)  = theta - E(alpha) g
    adjoint(lam, g, alpha) = (E(alpha) lam, -R(g lam))

Both are linear in each argument, so a derivative of either is again a step or an adjoint, to any order. No backward
calls a kernel that autograd cannot see.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from fastmeta.ops.inner_update import native, reference


def scale(lam: Tensor, alpha: Tensor, segments: Tensor | None) -> Tensor:  # [T, P]
    """``E(alpha) lam``."""
    u: Tensor = Adjoint.apply(lam, lam, alpha, segments, False)[0]
    return u


class Step(Function):
    """``theta - E(alpha) g``, eq. (3)."""

    @staticmethod
    def forward(theta: Tensor, g: Tensor, alpha: Tensor, segments: Tensor | None) -> Tensor:
        """Run the kernel."""
        return implementation(theta, g, alpha).step(theta, g, alpha, segments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivatives read."""
        _, g, alpha, ctx.segments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, alpha)
        ctx.save_for_forward(g, alpha)

    @staticmethod
    def backward(ctx: Any, lam: Tensor | None) -> tuple[Tensor | None, ...]:
        """``(lam, -E(alpha) lam, -R(g lam))``, eq. (5) and (7)."""
        if lam is None:
            return None, None, None, None
        g, alpha = ctx.saved_tensors
        _, need_g, need_alpha, _ = ctx.needs_input_grad
        d_g = d_alpha = None
        if need_g or need_alpha:
            u, d_alpha = Adjoint.apply(rows(lam), g, alpha, ctx.segments, need_alpha)
            d_g = -u if need_g else None
        return lam, d_g, d_alpha, None

    @staticmethod
    def jvp(ctx: Any, theta_dot: Tensor | None, g_dot: Tensor | None, alpha_dot: Tensor | None, _: None) -> Tensor:
        """``theta_dot - E(alpha) g_dot - E(alpha_dot) g``."""
        g, alpha = ctx.saved_tensors
        phi_dot = torch.zeros_like(g) if theta_dot is None else rows(theta_dot)
        if g_dot is not None:
            phi_dot = Step.apply(phi_dot, rows(g_dot), alpha, ctx.segments)
        if alpha_dot is not None:
            phi_dot = Step.apply(phi_dot, g, alpha_dot.contiguous(), ctx.segments)
        return phi_dot

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Fold the mapped axis into the tasks; with mapped alpha, which no kernel takes, map the reference."""
        theta, g, alpha, segments = inputs
        if in_dims[2] is not None:
            mapped = torch.vmap(partial(reference.step, segments=segments), in_dims=in_dims[:3])
            return mapped(theta, g, alpha), 0
        B = info.batch_size
        theta, g = fold(theta, in_dims[0], B), fold(g, in_dims[1], B)
        return Step.apply(theta, g, alpha, segments).unflatten(0, (B, -1)), 0


class Adjoint(Function):
    """``(E(alpha) lam, -R(g lam))``, eq. (5) and (7)."""

    @staticmethod
    def forward(
        lam: Tensor, g: Tensor, alpha: Tensor, segments: Tensor | None, need_alpha: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the kernel."""
        return implementation(lam, g, alpha).adjoint(lam, g, alpha, segments, need_alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        """Keep what the derivatives read."""
        lam, g, alpha, ctx.segments, ctx.need_alpha = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lam, g, alpha)
        ctx.save_for_forward(lam, g, alpha)

    @staticmethod
    def backward(ctx: Any, d_u: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, ...]:
        """``(E(alpha) d_u - E(c) g, -E(c) lam, R(lam d_u))`` for the cotangents ``d_u`` and ``c`` of d_alpha."""
        lam, g, alpha = ctx.saved_tensors
        need_lam, need_g, need_alpha, *_ = ctx.needs_input_grad
        d_lam = d_g = d_alpha = None
        if d_u is not None and (need_lam or need_alpha):
            d_lam, negative = Adjoint.apply(rows(d_u), lam, alpha, ctx.segments, need_alpha)
            d_alpha = -negative if need_alpha else None
        if c is not None:
            c = c.contiguous()
            if need_lam:
                d_lam = Step.apply(torch.zeros_like(g) if d_lam is None else d_lam, g, c, ctx.segments)
            if need_g:
                d_g = -scale(lam, c, ctx.segments)
        return d_lam, d_g, d_alpha, None, None

    @staticmethod
    def jvp(
        ctx: Any, lam_dot: Tensor | None, g_dot: Tensor | None, alpha_dot: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None]:
        """``(E(alpha) lam_dot + E(alpha_dot) lam, -R(g_dot lam) - R(g lam_dot))``."""
        lam, g, alpha = ctx.saved_tensors
        u_dot, d_alpha_dot = torch.zeros_like(lam), torch.zeros_like(alpha) if ctx.need_alpha else None
        if lam_dot is not None:
            u_dot, d_alpha_dot = Adjoint.apply(rows(lam_dot), g, alpha, ctx.segments, ctx.need_alpha)
        if alpha_dot is not None:
            u_dot = u_dot + scale(lam, alpha_dot.contiguous(), ctx.segments)
        if g_dot is not None and d_alpha_dot is not None:
            d_alpha_dot = d_alpha_dot + Adjoint.apply(lam, rows(g_dot), alpha, ctx.segments, True)[1]
        return u_dot, d_alpha_dot

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, Tensor | None], tuple[int, int | None]]:
        """Fold the mapped axis into the tasks; with alpha or d_alpha along it, map the reference."""
        lam, g, alpha, segments, need_alpha = inputs
        if need_alpha:
            mapped = torch.vmap(partial(reference.adjoint, segments=segments), in_dims=in_dims[:3])
            return mapped(lam, g, alpha), (0, 0)
        if in_dims[2] is not None:
            scaled = torch.vmap(partial(reference.scale, segments=segments), in_dims=(in_dims[0], in_dims[2]))
            return (scaled(lam, alpha), None), (0, None)
        B = info.batch_size
        lam, g = fold(lam, in_dims[0], B), fold(g, in_dims[1], B)
        return (Adjoint.apply(lam, g, alpha, segments, False)[0].unflatten(0, (B, -1)), None), (0, None)


def implementation(*tensors: Tensor) -> ModuleType:
    """The kernels, or the reference for tensors without memory of their own.

    Autograd's own batching (``is_grads_batched=True``, gradcheck's batched checks) passes such tensors, past ``vmap``
    below; subclasses of a tensor may, too.
    """
    if not all(type(x) in (Tensor, Parameter) and torch._C._has_storage(x) for x in tensors):
        return reference
    if tensors[0].is_cpu:
        return native
    from fastmeta.ops.inner_update import triton

    return triton


def rows(x: Tensor) -> Tensor:
    """``x`` with the elements of a row side by side."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def fold(x: Tensor, dim: int | None, B: int) -> Tensor:  # [B * T, P]
    """Bring the mapped axis in front of the tasks and count through both; an axis of its own where it has none."""
    x = x.expand(B, *x.shape) if dim is None else x.movedim(dim, 0)
    return rows(x.flatten(0, 1))

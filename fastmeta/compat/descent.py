"""Gradients of a loss, and steps along them, that autograd sees: of a perceptron each is one node of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.compat.perceptron import Perceptron, Recognised, Sweep, recognised

Step = Callable[[float, list[Tensor], list[Tensor]], Sequence[Tensor]]

# What a node computes itself need not pass autograd's own kernels, which record nothing there and take their time.
_unrecorded = torch._C._AutoDispatchBelowAutograd


class _Node(Function):
    """Of parameters ``p`` the gradient ``g`` of their loss, or with ``step`` what it makes of them, ``p - rate g``."""

    @staticmethod
    def forward(ctx: Any, found: Recognised, rate: float, step: Step | None, *own: Tensor) -> Any:
        with _unrecorded():
            gradients, sweep = found.net.gradient(len(own), *found.tensors)
            results = gradients if step is None else step(rate, list(own), gradients)
        inputs, transposed, last, ds, kept = sweep
        ctx.net, ctx.rate, ctx.steps, ctx.number = found.net, rate, step is not None, len(own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*own, *inputs, *transposed, last, *ds, *kept)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        saved, n, depth = ctx.saved_tensors, ctx.number, len(ctx.net.layers)
        own, rest, last, ds = saved[:n], n + depth, n + 2 * depth - 1, n + 2 * depth
        sweep = Sweep(saved[n:rest], saved[rest:last], saved[last], saved[ds : ds + depth], saved[ds + depth :])
        cast = torch._C._is_any_autocast_enabled()
        with torch.autocast(own[0].device.type, enabled=False) if cast else nullcontext():
            if torch.is_grad_enabled():
                return None, None, None, *_by_autograd(ctx.net, sweep, ctx.rate if ctx.steps else None, own, along)
            with _unrecorded():
                onto, rate = (along, -ctx.rate) if ctx.steps else ([None] * n, 1.0)
                return None, None, None, *ctx.net.pullback(sweep, along, onto, rate)


def _by_autograd(
    net: Perceptron, sweep: Sweep, rate: float | None, own: Sequence[Tensor], along: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """What :class:`_Node` pulls back, differentiable once more; with a ``rate`` where it steps."""
    own = [p.view_as(p) for p in own]  # apart from what they may have been made of
    results: Sequence[Tensor] = torch.autograd.grad(net.value(own, sweep), own, create_graph=True)
    if rate is not None:
        results = [torch.sub(p, g, alpha=rate) for p, g in zip(own, results, strict=True)]
    pairs = [(r, v) for r, v in zip(results, along, strict=True) if v is not None and r.requires_grad]
    if not pairs:
        return [None] * len(own)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, own, cotangents, create_graph=True, allow_unused=True)


def rounded(rate: float, parameters: list[Tensor], gradients: list[Tensor]) -> Sequence[Tensor]:
    """``p + (-rate * g)`` of each, the product rounded; gradients are overwritten."""
    first = gradients[0]
    if first.is_cpu and first.dtype in (torch.float32, torch.float64):  # by a tensor it takes half the time
        torch._foreach_mul_(gradients, torch.tensor(-rate, dtype=first.dtype, device="cpu"))
    else:
        torch._foreach_mul_(gradients, -rate)
    return torch._foreach_add(parameters, gradients)


def fused(rate: float, parameters: list[Tensor], gradients: list[Tensor]) -> Sequence[Tensor]:
    """``torch.sub(p, g, alpha=rate)`` of each, whose product is not rounded by itself."""
    return torch._foreach_sub(parameters, gradients, alpha=rate)


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """``torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)``."""
    found = recognised(loss, parameters)
    if found is None:
        return torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return _spread(found, len(parameters), _Node.apply(found, 1.0, None, *(parameters[i] for i in found.places)))


def descended(loss: Tensor, parameters: Sequence[Tensor], rate: float, step: Step) -> list[Tensor | None] | None:
    """``step(rate, p, g)``, which is ``p - rate g``, for each parameter that the loss uses, and ``None`` for others.

    Args:
        loss: ``[]``.
        parameters: each requires grad.
        rate: of the step.
        step: :func:`rounded` or :func:`fused`.

    Returns:
        The parameters after the step; ``None`` where the loss is no perceptron's.
    """
    found = recognised(loss, parameters)
    if found is None:
        return None
    return _spread(found, len(parameters), _Node.apply(found, rate, step, *(parameters[i] for i in found.places)))


def _spread(found: Recognised, number: int, results: Sequence[Tensor]) -> list[Tensor | None]:
    spread: list[Tensor | None] = [None] * number
    for i, result in zip(found.places, results, strict=True):
        spread[i] = result
    return spread

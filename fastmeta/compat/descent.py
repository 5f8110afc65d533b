"""Gradients of a loss, and steps along them, that autograd sees: of a perceptron each is one node of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastmeta.compat.perceptron import Perceptron, Recognised, Sweep, recognised

Step = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]

# What a node computes itself need not pass autograd's own kernels, which record nothing there and take their time.
_unrecorded = torch._C._AutoDispatchBelowAutograd


class _Node(Function):
    """Of parameters ``p`` the gradient ``g`` of their loss, or ``p - rate g``."""

    @staticmethod
    def forward(ctx: Any, found: Recognised, rate: float, step: Step | None, *own: Tensor) -> Any:
        with _unrecorded():
            gradients, sweep = found.net.gradient(len(own), *found.tensors)
            results = gradients if step is None else step(list(own), gradients)
        inputs, transposed, last, ds, kept = sweep
        ctx.net, ctx.rate, ctx.step, ctx.number = found.net, rate, step, len(own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*own, *inputs, *transposed, last, *ds, *kept)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        saved, n, depth = ctx.saved_tensors, ctx.number, len(ctx.net.layers)
        own, rest, last, ds = saved[:n], n + depth, n + 2 * depth - 1, n + 2 * depth
        sweep = Sweep(saved[n:rest], saved[rest:last], saved[last], saved[ds : ds + depth], saved[ds + depth :])
        with (
            torch.autocast(own[0].device.type, enabled=False) if torch._C._is_any_autocast_enabled() else nullcontext()
        ):
            if torch.is_grad_enabled():
                return None, None, None, *_by_autograd(ctx.net, sweep, ctx.step, own, along)
            with _unrecorded():
                scaled = along if ctx.step is None else _times(along, -ctx.rate)
                onto = [None] * n if ctx.step is None else along
                return None, None, None, *ctx.net.pullback(sweep, scaled, onto)


def _by_autograd(
    net: Perceptron, sweep: Sweep, step: Step | None, own: Sequence[Tensor], along: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """What :class:`_Node` pulls back, differentiable once more."""
    own = [p.view_as(p) for p in own]  # apart from what they may have been made of
    results: Sequence[Tensor] = torch.autograd.grad(net.value(own, sweep), own, create_graph=True)
    results = results if step is None else step(own, list(results))
    pairs = [(r, v) for r, v in zip(results, along, strict=True) if v is not None and r.requires_grad]
    if not pairs:
        return [None] * len(own)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, own, cotangents, create_graph=True, allow_unused=True)


def _times(tensors: Sequence[Tensor | None], factor: float) -> list[Tensor | None]:
    given = [t for t in tensors if t is not None]
    made = iter(times(given, factor) if given else ())
    return [None if t is None else next(made) for t in tensors]


def times(tensors: list[Tensor], factor: float) -> Sequence[Tensor]:
    """``torch._foreach_mul`` by a number, which on a CPU takes half the time outside a graph."""
    first = tensors[0]
    if first.is_cpu and first.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled():
        return torch._foreach_mul(tensors, torch.tensor(factor, dtype=first.dtype, device="cpu"))
    return torch._foreach_mul(tensors, factor)


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
    """``step(p, g)``, which is ``p - rate g``, for each of the parameters that the loss uses, ``None`` for others.

    Returns ``None`` where the loss is no perceptron's.
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

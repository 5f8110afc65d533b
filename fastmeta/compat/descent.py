"""Gradients of a loss, and steps along them, that autograd sees: of a perceptron each is one node of the graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from fastmeta.compat.perceptron import Passed, Perceptron, Recognised, recognised

Step = Callable[[float, list[Tensor], list[Tensor]], Sequence[Tensor]]


class Found(NamedTuple):
    """A perceptron's gradient.

    Attributes:
        net: the perceptron.
        passed: what its forward pass has left.
        ds: the derivatives of the loss by every ``z_l``.
        gradients: by its parameters.
    """

    net: Perceptron
    passed: Passed
    ds: Tensor
    gradients: list[Tensor]


# What a node computes itself need not pass autograd's own kernels, which record nothing there and take their time.
_unrecorded = torch._C._AutoDispatchBelowAutograd


class _Node(Function):
    """Of parameters ``p`` the gradient ``g`` of their loss, or with ``step`` what it makes of them, ``p - rate g``."""

    @staticmethod
    def forward(ctx: Any, found: Found, rate: float, step: Step | None, *own: Tensor) -> Any:
        net, passed, ds, gradients = found
        if step is None:
            results: Sequence[Tensor] = gradients
        else:
            with _unrecorded():
                results = step(rate, list(own), gradients)
        ctx.net, ctx.rate, ctx.number = net, None if step is None else rate, len(own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*own, ds, passed.last, passed.out, passed.target, *passed.inputs)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        saved, n = ctx.saved_tensors, ctx.number
        own, (ds, last, out, target, *inputs) = saved[:n], saved[n:]
        passed = Passed(inputs, last, out, target)
        recorded = torch.is_grad_enabled()
        if not recorded and not any(map(_many, along)):
            return None, None, None, *ctx.net.pull_back(passed, own, ds, along, ctx.rate)
        cast = torch._C._is_any_autocast_enabled()
        with torch.enable_grad(), torch.autocast(own[0].device.type, enabled=False) if cast else nullcontext():
            return None, None, None, *_by_autograd(ctx.net, passed, ctx.rate, own, along, recorded)


def _many(v: Tensor | None) -> bool:
    """Whether a tensor stands for many, as under ``is_grads_batched``, and has no memory of its own."""
    return v is not None and (torch._C._functorch.is_legacy_batchedtensor(v) or torch._C._functorch.is_batchedtensor(v))


def _by_autograd(
    net: Perceptron,
    passed: Passed,
    rate: float | None,
    own: Sequence[Tensor],
    along: Sequence[Tensor | None],
    recorded: bool,
) -> Sequence[Tensor | None]:
    """What :class:`_Node` pulls back, ``recorded`` to be differentiated; with a ``rate`` where it steps."""
    own = [p.view_as(p) for p in own]  # apart from what they may have been made of
    results: Sequence[Tensor] = torch.autograd.grad(net.value(own, passed), own, create_graph=True)
    if rate is not None:
        results = [torch.sub(p, g, alpha=rate) for p, g in zip(own, results, strict=True)]
    pairs = [(r, v) for r, v in zip(results, along, strict=True) if v is not None and r.requires_grad]
    if not pairs:
        return [None] * len(own)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, own, cotangents, create_graph=recorded, allow_unused=True)


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
    known = recognised(loss, parameters)
    own = [] if known is None else [parameters[i] for i in known.places]
    found = None if known is None else _found(known, loss, own)
    if known is None or found is None:
        return torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return _spread(known, len(parameters), _Node.apply(found, 1.0, None, *own))


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
    known = recognised(loss, parameters)
    if known is None:
        return None
    own = [parameters[i] for i in known.places]
    found = _found(known, loss, own)
    if found is not None:
        return _spread(known, len(parameters), _Node.apply(found, rate, step, *own))
    recorded = torch.autograd.grad(loss, own, create_graph=True)
    return _spread(known, len(parameters), step(rate, own, [g.clone() for g in recorded]))


class _Quiet(threading.local):
    """Until when no hook has been registered that is not known of: how many had been, and what autograd had counted."""

    handles = -1
    nodes = 0

    def holds(self, first: int) -> bool:
        """Whether there is no hook in a graph whose first node has that number in sequence.

        Every hook takes a number, and can only be registered once its node is there. Nodes are counted by each thread
        for itself: the graph must be of this one.
        """
        known, self.handles = self.handles, RemovableHandle.next_id
        if known == self.handles:
            return first >= self.nodes
        self.nodes = torch._C._autograd._get_sequence_nr()
        return False


_quiet = _Quiet()


def _found(known: Recognised, loss: Tensor, own: list[Tensor]) -> Found | None:
    """The gradient; by autograd itself where there may be hooks. ``None`` where one changed it."""
    if _quiet.holds(known.first):
        with _unrecorded():
            gradients = known.net.gradient(known.passed, own)
    else:
        gradients = list(torch.autograd.grad(loss, own, retain_graph=True))
    ds = known.net.descended(known.passed, own, gradients)
    return None if ds is None else Found(known.net, known.passed, ds, gradients)


def _spread(known: Recognised, number: int, results: Sequence[Tensor]) -> list[Tensor | None]:
    spread: list[Tensor | None] = [None] * number
    for i, result in zip(known.places, results, strict=True):
        spread[i] = result
    return spread

"""MAML's meta-gradient as one writes it by hand, for the demonstration to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastmeta.tasks import TaskBatch

Loss = Callable[[Tensor, Tensor], Tensor]
Gradients = dict[str, Tensor]


def loop(model: nn.Module, loss: Loss, tasks: TaskBatch, lr: float, steps: int) -> tuple[Tensor, Gradients]:
    """One task after another, autograd through the unrolled inner loop."""
    theta: Gradients = dict(model.named_parameters())
    total = torch.zeros((), dtype=next(iter(theta.values())).dtype)
    (xs, ys), (xq, yq) = tasks.support, tasks.query
    for t in range(tasks.size):
        phi = theta
        for _ in range(steps):
            inner = loss(functional_call(model, phi, (xs[t],)), ys[t])
            g = torch.autograd.grad(inner, list(phi.values()), create_graph=True)
            phi = {name: p - lr * d for (name, p), d in zip(phi.items(), g, strict=True)}
        total = total + loss(functional_call(model, phi, (xq[t],)), yq[t]) / tasks.size
    return total, dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))


def vmapped(model: nn.Module, loss: Loss, tasks: TaskBatch, lr: float, steps: int) -> tuple[Tensor, Gradients]:
    """All tasks at once: ``torch.func.vmap`` over tasks of ``torch.func.grad``.

    The other order, one ``grad`` of a ``vmap``, loses a part of batch norm's second derivative in PyTorch 2.13.
    """
    theta: Gradients = {name: p.detach() for name, p in model.named_parameters()}

    def inner(phi: Gradients, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, phi, (x,)), y)

    def outer(phi: Gradients, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        for _ in range(steps):
            g = torch.func.grad(inner)(phi, xs, ys)
            phi = {name: p - lr * g[name] for name, p in phi.items()}
        return inner(phi, xq, yq)

    in_dims = (None, 0, 0, 0, 0)
    each, losses = vmap(torch.func.grad_and_value(outer), in_dims)(theta, *tasks.support, *tasks.query)
    return losses.mean(), {name: g.mean(0) for name, g in each.items()}


def relative_error(value: Gradients, truth: Gradients) -> float:
    """Largest ``|value - truth| / |truth|`` (2-norms, in float64) of any parameter."""
    return max(
        float((value[name].double() - true.double()).norm() / true.double().norm()) for name, true in truth.items()
    )

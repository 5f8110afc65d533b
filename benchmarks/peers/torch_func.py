"""torch.func: vmap over tasks, and grad, of a query loss after inner steps of grad.

Where the model has a batch norm with weights, vmap stands outside: ``grad(vmap(grad))`` loses part of that layer's
second derivative without a word (seen with torch 2.13: an error of 1e-3 to 1e-2 in float64).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.peers.base import Step, Variant
from benchmarks.workloads import Problem

Params = dict[str, Tensor]


def task_loss(problem: Problem) -> Callable[[Params, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The query loss of one task as a function of the shared weights."""
    model, loss = problem.model, problem.loss

    def inner(phi: Params, others: Params, x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, {**others, **phi}, (x,)), y)

    def outer(p: Params, xs: Tensor, ys: Tensor, xq: Tensor, yq: Tensor) -> Tensor:
        others = {n: v for n, v in p.items() if not problem.adapts(n)}
        phi = {n: v for n, v in p.items() if problem.adapts(n)}
        for _ in range(problem.steps):
            g = grad(inner)(phi, others, xs, ys)
            phi = {n: phi[n] - problem.lr * g[n] for n in phi}
        return inner(phi, others, xq, yq)

    return outer


def meta_gradient(problem: Problem) -> Callable[..., Params]:
    """The meta-gradient as a function of the shared weights and all tasks' tensors."""
    outer = task_loss(problem)
    if any(isinstance(m, nn.BatchNorm2d) for m in problem.model.modules()):
        per_task = vmap(grad(outer), in_dims=(None, 0, 0, 0, 0))
        return lambda p, *tensors: {n: g.mean(0) for n, g in per_task(p, *tensors).items()}

    def mean(p: Params, *tensors: Tensor) -> Tensor:
        return vmap(outer, in_dims=(None, 0, 0, 0, 0))(p, *tensors).mean()

    return grad(mean)


def prepare(problem: Problem) -> Step:
    theta = {n: p.detach() for n, p in problem.model.named_parameters()}
    gradient = meta_gradient(problem)
    return Step(lambda: gradient(theta, *problem.support, *problem.query))


FUNC = Variant("torch.func", "torch.func", "eager", prepare, "torch.func grad and vmap over tasks", partial=True)

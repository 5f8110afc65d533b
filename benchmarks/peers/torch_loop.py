"""The loop everyone writes by hand: functional_call and autograd.grad(create_graph=True), one task after another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from benchmarks.peers.base import Step, Variant
from benchmarks.workloads import Problem


def prepare(problem: Problem) -> Step:
    model, loss = problem.model, problem.loss
    theta = dict(model.named_parameters())
    names, values = list(theta), list(theta.values())
    adapted = [name for name in names if problem.adapts(name)]
    tasks = list(zip(*problem.support, *problem.query, strict=True))

    def run() -> dict[str, Tensor]:
        total = [torch.zeros_like(p) for p in values]
        for xs, ys, xq, yq in tasks:
            phi = theta
            for _ in range(problem.steps):
                inner = loss(functional_call(model, phi, (xs,)), ys)
                g = torch.autograd.grad(inner, [phi[n] for n in adapted], create_graph=True)
                phi = {**phi, **{n: phi[n] - problem.lr * d for n, d in zip(adapted, g, strict=True)}}
            outer = loss(functional_call(model, phi, (xq,)), yq) / len(tasks)
            # One backward a task frees its graph at once, so this is the loop at its smallest memory.
            torch._foreach_add_(total, torch.autograd.grad(outer, values))
        return dict(zip(names, total, strict=True))

    return Step(run)


LOOP = Variant("loop", "loop", "eager", prepare, "hand-written PyTorch loop over tasks", partial=True)

"""higher: a differentiable SGD over a monkey-patched module, one task after another."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Step, Unavailable, Variant
from benchmarks.workloads import Problem


def prepare(problem: Problem) -> Step:
    try:
        import higher
    except ImportError as error:
        raise Unavailable(str(error)) from error

    model, loss = problem.model, problem.loss
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr)
    tasks = list(zip(*problem.support, *problem.query, strict=True))

    def run() -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for xs, ys, xq, yq in tasks:
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(problem.steps):
                    inner.step(loss(fast(xs), ys))
                (loss(fast(xq), yq) / len(tasks)).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    return Step(run)


HIGHER = Variant("higher", "higher", "eager", prepare, "higher.innerloop_ctx with SGD, tasks in a loop")

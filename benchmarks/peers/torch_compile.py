"""torch.compile in the two forms that work: of the vmapped torch.func gradient, and of one task's in a loop.

torch.compile has no double backward, so the loop with ``create_graph`` cannot be compiled; torch.func's transforms are
inlined into the graph before differentiation and can.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import nn
from torch.func import grad

from benchmarks.peers.base import Step, Unsupported, Variant
from benchmarks.peers.torch_func import Params, meta_gradient, task_loss
from benchmarks.workloads import Problem


def _start_afresh() -> None:
    # What another process has left in the compiler's cache on disk is compiled again from its source, without the flags
    # of the vector instructions it uses (torch 2.13), and fails.
    torch._inductor.config.force_disable_caches = True
    torch._dynamo.reset()


def prepare_vmap(problem: Problem) -> Step:
    _start_afresh()
    return _bind_vmap(torch.compile(meta_gradient(problem), fullgraph=True, dynamic=False), problem)


def _bind_vmap(compiled: Callable[..., Params], problem: Problem) -> Step:
    theta = {n: p.detach() for n, p in problem.model.named_parameters()}
    return Step(
        lambda: compiled(theta, *problem.support, *problem.query), again=functools.partial(_bind_vmap, compiled)
    )


def prepare_task(problem: Problem) -> Step:
    if not any(isinstance(m, nn.Conv2d) for m in problem.model.modules()):
        raise Unsupported("without convolutions the vmapped form is the faster one")
    _start_afresh()
    return _bind_task(torch.compile(grad(task_loss(problem)), fullgraph=True, dynamic=False), problem)


def _bind_task(compiled: Callable[..., Params], problem: Problem) -> Step:
    theta = {n: p.detach() for n, p in problem.model.named_parameters()}
    tasks = list(zip(*problem.support, *problem.query, strict=True))

    def run() -> Params:
        total = [torch.zeros_like(p) for p in theta.values()]
        for task in tasks:
            g = compiled(theta, *task)
            torch._foreach_add_(total, [g[n] for n in theta], alpha=1 / len(tasks))
        return dict(zip(theta, total, strict=True))

    return Step(run, again=functools.partial(_bind_task, compiled))


COMPILE_VMAP = Variant(
    "compile.vmap", "torch.compile", "compiled", prepare_vmap, "torch.compile of torch.func's grad and vmap", True, True
)
COMPILE_TASK = Variant(
    "compile.task",
    "torch.compile",
    "compiled",
    prepare_task,
    "torch.compile of torch.func's grad of one task, in a loop",
    probe=True,
    partial=True,
)

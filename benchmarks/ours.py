"""fastmeta's two ways to a meta-gradient."""

from __future__ import annotations

from benchmarks.peers.base import Step, Variant
from benchmarks.workloads import Problem


def prepare_value_and_grad(problem: Problem) -> Step:
    import fastmeta as fm

    maml = fm.MAML(problem.model, problem.loss, lr=problem.lr, steps=problem.steps)
    tasks = fm.TaskBatch(support=problem.support, query=problem.query)
    return Step(lambda: maml.value_and_grad(tasks)[1])


def prepare_backward(problem: Problem) -> Step:
    import fastmeta as fm

    maml = fm.MAML(problem.model, problem.loss, lr=problem.lr, steps=problem.steps)
    tasks = fm.TaskBatch(support=problem.support, query=problem.query)
    parameters = dict(problem.model.named_parameters())

    def run() -> None:
        for p in parameters.values():
            p.grad = None
        maml(tasks).loss.backward()

    return Step(run, lambda _: {n: p.grad for n, p in parameters.items() if p.grad is not None})


OURS: tuple[Variant, ...] = (
    Variant("fastmeta", "fastmeta", "ours", prepare_value_and_grad, "fastmeta MAML.value_and_grad"),
    Variant("fastmeta.backward", "fastmeta", "ours", prepare_backward, "fastmeta MAML(tasks).loss.backward()"),
)

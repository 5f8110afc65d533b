"""fastmeta's two ways to a meta-gradient."""

from __future__ import annotations

import functools
from typing import Any

import fastmeta as fm
from benchmarks.peers.base import Step, Variant
from benchmarks.workloads import Problem


def learner(problem: Problem, **options: Any) -> tuple[fm.MAML, fm.TaskBatch]:
    """What users would write for ``problem``."""
    maml = fm.MAML(problem.model, problem.loss, problem.lr, problem.steps, parameters=problem.adapted, **options)
    return maml, fm.TaskBatch(support=problem.support, query=problem.query)


def prepare_value_and_grad(problem: Problem, **options: Any) -> Step:
    maml, tasks = learner(problem, **options)
    return Step(lambda: maml.value_and_grad(tasks)[1])


def prepare_backward(problem: Problem) -> Step:
    maml, tasks = learner(problem)
    parameters = dict(problem.model.named_parameters())

    def run() -> None:
        for p in parameters.values():
            p.grad = None
        maml(tasks).loss.backward()

    return Step(run, lambda _: {n: p.grad for n, p in parameters.items() if p.grad is not None})


OURS: tuple[Variant, ...] = (
    Variant("fastmeta", "fastmeta", "ours", prepare_value_and_grad, "fastmeta MAML.value_and_grad", partial=True),
    Variant(
        "fastmeta.backward",
        "fastmeta",
        "ours",
        prepare_backward,
        "fastmeta MAML(tasks).loss.backward()",
        partial=True,
    ),
)

PLANNED: tuple[Variant, ...] = tuple(
    Variant(
        f"fastmeta.{plan}",
        "fastmeta",
        "ours",
        functools.partial(prepare_value_and_grad, plan=plan),
        f"fastmeta MAML.value_and_grad, plan={plan!r}",
        partial=True,
    )
    for plan in ("dense", "factored")
)

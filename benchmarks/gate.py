"""The error gate: no time is reported for a gradient that is wrong.

Truth is the float64 oracle. What float32 can give is measured on the hand-written loop: as it stands, and with its
weights nudged in their last places, for rounding may flip a ReLU or an argmax and move the gradient of a whole task.
A variant passes while its error is at most ``FACTOR`` times the largest of these.

One such flip makes that bound loose. So the eager peers and fastmeta must also be right in float64 on the first tasks,
and the compiled peers and fastmeta, whose float32 code is not their float64 code, in float32 on batches that repeat one
task, in the median over several: most tasks have no flip.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.base import Step, Variant
from benchmarks.peers.torch_loop import LOOP
from benchmarks.workloads import Problem
from tests.oracle import maml_loop, relative_error, relative_errors, total_error

FACTOR = 2.0  # the project's law: at most twice PyTorch's own float32 error on the same work
EXACT = 1e-9  # the same in float64, where no unit in the last place flips anything
SINGLES = 4  # tasks that are looked at one by one

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Errors:
    """Relative errors of a meta-gradient against float64."""

    total: float  # all parameters as one vector
    worst: float  # of the worst parameter
    parameter: str  # which one that is
    float64: float | None = None  # worst parameter, the first tasks in float64
    task: float | None = None  # all parameters, one task at a time in float32, the median


@dataclass(frozen=True)
class Single:
    """One task by itself."""

    problem: Problem
    truth: Gradients
    float32: float  # the largest error of the loop and its nudged copies


@dataclass(frozen=True)
class Gate:
    """The truth of one problem and how far from it float32 may be."""

    truth: Gradients
    loop: Errors  # the hand-written loop in float32
    float32: Errors  # the largest seen of the loop and its nudged copies
    singles: list[Single]

    def judge(self, variant: Variant, problem: Problem, step: Step) -> tuple[Errors, str]:
        """Errors of a prepared variant, and why it is not timed: empty where it may be."""
        errors = _errors(step.gradients(step.run()), self.truth)
        refusal = self._over(errors)
        if not refusal and variant.kind != "compiled":
            errors, refusal = self._exact(variant, problem, errors)
        if not refusal and variant.kind != "eager":
            errors, refusal = self._by_task(variant, problem.tasks, step, errors)
        return errors, refusal

    def _over(self, errors: Errors) -> str:
        for what in ("total", "worst"):
            error, bound = getattr(errors, what), FACTOR * getattr(self.float32, what)
            if not error <= bound:
                where = f" ({errors.parameter})" if what == "worst" else ""
                return f"{what} error {error:.1e}{where} is over {bound:.1e}, twice what float32 gives here"
        return ""

    def _exact(self, variant: Variant, problem: Problem, errors: Errors) -> tuple[Errors, str]:
        few = self.singles[:2]
        truth = {name: sum(s.truth[name] for s in few) / len(few) for name in self.truth}
        step = variant.prepare(problem.first(len(few)).double())
        error = relative_error(step.gradients(step.run()), truth)
        refusal = "" if error <= EXACT else f"error in float64 {error:.1e} is over {EXACT:.0e}"
        return dataclasses.replace(errors, float64=error), refusal

    def of_a_task(self, tasks: int, gradients: Callable[[Problem], Gradients]) -> tuple[float, float]:
        """Median error of ``gradients`` over batches that repeat one task, and what it may be at the most."""
        each = [total_error(gradients(single.problem.repeated(tasks)), single.truth) for single in self.singles]
        return statistics.median_low(each), FACTOR * statistics.median_low(s.float32 for s in self.singles)

    def _by_task(self, variant: Variant, tasks: int, step: Step, errors: Errors) -> tuple[Errors, str]:
        again = step.again or (lambda problem: variant.prepare(_own(problem)))

        def gradients(problem: Problem) -> Gradients:
            other = again(problem)
            return other.gradients(other.run())

        error, bound = self.of_a_task(tasks, gradients)
        refusal = "" if error <= bound else f"median error of a task {error:.1e} is over {bound:.1e}, twice float32's"
        return dataclasses.replace(errors, task=error), refusal


def open_gate(problem: Problem, nudges: int) -> Gate:
    """Compute the truth and float32's own error for ``problem`` and so many nudged copies, on one thread.

    A second thread gains little on one small task after another, and loses much where other processes want its core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _open(problem, nudges)
    finally:
        torch.set_num_threads(threads)


def _open(problem: Problem, nudges: int) -> Gate:
    truth = _truth(problem)
    copies = [problem, *(problem.nudged(seed) for seed in range(nudges))]
    loop, *nudged = (_errors(_loop(p), truth) for p in copies)
    everyone = [loop, *nudged]
    worst = max(everyone, key=lambda e: e.worst)
    float32 = Errors(max(e.total for e in everyone), worst.worst, worst.parameter)
    return Gate(truth, loop, float32, [_single(copies, t) for t in range(min(SINGLES, problem.tasks))])


def _single(copies: list[Problem], task: int) -> Single:
    alone = [p.only(task) for p in copies]
    truth = _truth(alone[0])
    return Single(alone[0], truth, max(total_error(_loop(p), truth) for p in alone))


def _truth(problem: Problem) -> Gradients:
    p = problem.double()
    return maml_loop(p.model, p.loss, p.support, p.query, p.lr, p.steps, adapted_names=p.adapted)[3]


def _loop(problem: Problem) -> Gradients:
    return LOOP.prepare(problem).run()


def _own(problem: Problem) -> Problem:
    return dataclasses.replace(problem, model=copy.deepcopy(problem.model))


def _errors(gradients: Gradients, truth: Gradients) -> Errors:
    each = relative_errors(gradients, truth)
    parameter = max(each, key=lambda name: each[name])
    return Errors(total_error(gradients, truth), each[parameter], parameter)

"""The error gate: no time is reported for a gradient that is wrong.

Truth is the float64 oracle. What float32 can give is measured on the hand-written loop: as it stands, and with its
weights nudged by a unit in the last place, for one such unit may flip a ReLU or an argmax and move the gradient of a
whole task. A variant passes while its error is at most ``FACTOR`` times the largest of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.peers import LOOP
from benchmarks.workloads import Problem
from tests.oracle import maml_loop, relative_errors, total_error

FACTOR = 2.0  # the project's law: at most twice PyTorch's own float32 error on the same work
NUDGES = 4


@dataclass(frozen=True)
class Errors:
    """Relative errors of a meta-gradient against float64."""

    total: float  # all parameters as one vector
    worst: float  # of the worst parameter
    parameter: str  # which one that is


@dataclass(frozen=True)
class Gate:
    """The truth of one problem and how far from it float32 may be."""

    truth: dict[str, Tensor]
    loop: Errors  # the hand-written loop in float32
    float32: Errors  # the largest seen of the loop and its nudged copies

    def errors(self, gradients: dict[str, Tensor]) -> Errors:
        return _errors(gradients, self.truth)

    def refusal(self, errors: Errors) -> str:
        """Why a gradient with these errors is not timed; empty where it may be."""
        for what in ("total", "worst"):
            error, bound = getattr(errors, what), FACTOR * getattr(self.float32, what)
            if not error <= bound:
                where = f" ({errors.parameter})" if what == "worst" else ""
                return f"{what} error {error:.1e}{where} is over {bound:.1e}, twice what float32 gives here"
        return ""


def open_gate(problem: Problem) -> Gate:
    """Compute the truth and float32's own error for ``problem``."""
    wide = problem.double()
    truth = maml_loop(wide.model, wide.loss, wide.support, wide.query, wide.lr, wide.steps)[3]
    loop, *nudged = (
        _errors(LOOP.prepare(p).run(), truth) for p in (problem, *(problem.nudged(seed) for seed in range(NUDGES)))
    )
    everyone = [loop, *nudged]
    worst = max(everyone, key=lambda e: e.worst)
    return Gate(truth, loop, Errors(max(e.total for e in everyone), worst.worst, worst.parameter))


def _errors(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    each = relative_errors(gradients, truth)
    parameter = max(each, key=lambda name: each[name])
    return Errors(total_error(gradients, truth), each[parameter], parameter)

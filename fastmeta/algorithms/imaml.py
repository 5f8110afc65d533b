"""Implicit MAML: the meta-gradient at the end of the inner loop, whatever way it went there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from fastmeta.algorithms.maml import MAML
from fastmeta.core import checks
from fastmeta.engine.evaluation import Solution
from fastmeta.engine.work import Implicit
from fastmeta.inner.rates import Rate


class IMAML(MAML):
    """Implicit MAML: the inner loop minimises ``ls(phi) + lambda |phi - theta|^2 / 2``, and is not differentiated.

    At the minimum ``phi*`` of a task, with ``H`` the Hessian of its support loss there and ``b`` the gradient of its
    query loss over T, the meta-gradient is (docs/maths.md, eq. 24)::

        (H + lambda I) v = b;    d_theta = sum_t lambda v;    d_psi = sum_t [ d lq/d psi / T - d<g, v>/d psi ]

    for what adapts and for what does not. Conjugate gradients solve for ``v``, all tasks at once, each until its own
    residual is below ``tolerance |b|``; a step of theirs is one Hessian-vector product of the engine. Memory does not
    grow with ``steps``. The gradient is exact where the inner loop has converged and the residual is small, which
    :attr:`solution` tells after every meta-step.

    Args:
        model, loss: as :class:`fastmeta.MAML` has them. The model must be one that can be traced.
        lr, steps: of the inner loop, whose steps go along ``g + lambda (phi - theta)``.
        strength: lambda, positive. Larger ones make the inner problem better conditioned, and keep ``phi*`` nearer.
        cg_steps: iterations of conjugate gradients at most.
        tolerance: of the residual.
        damping: added to lambda in the linear system alone, as the authors do for stability; the gradient is then that
            of no inner problem exactly. 0 for none.
        options: the other arguments of :class:`fastmeta.MAML`, among them ``inner``, a rule for the inner steps;
            but not ``plan``, ``first_order``, ``engine``, ``memory_budget`` and ``update_running_stats``.

    Raises:
        TypeError: one of these is given, or an argument is of another type.
        ValueError: ``strength`` is not positive, a count or ``damping`` negative; in a meta-step: a learned rate, which
            gets no gradient.
        RuntimeError: the model cannot be traced.

    Source: A. Rajeswaran, C. Finn, S. Kakade, S. Levine, NeurIPS 2019.
    """

    _batch_norms: ClassVar[tuple[str, ...]] = ("transductive", "running", "per_task")

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any],
        lr: Rate | None = None,
        steps: int = 10,
        *,
        strength: float = 2.0,
        cg_steps: int = 10,
        tolerance: float = 1e-6,
        damping: float = 0.0,
        **options: Any,
    ) -> None:
        refused = {"plan", "first_order", "engine", "memory_budget", "update_running_stats"} & options.keys()
        if refused:
            raise TypeError(f"IMAML: {sorted(refused)} must be left out, because the inner loop is not differentiated")
        super().__init__(model, loss, lr, steps, plan="dense", engine="program", **options)
        self.strength, self.cg_steps, self.tolerance, self.damping = strength, cg_steps, tolerance, damping
        self._report: list[Solution] = []
        self._asked(self.steps)

    @property
    def solution(self) -> Solution | None:
        """How well the latest meta-gradient's linear systems were solved, ``[T]`` each; ``None`` before the first."""
        return self._report[-1] if self._report else None

    def extra_repr(self) -> str:
        """Settings, for ``print``."""
        return f"{super().extra_repr()}, strength={self.strength}, cg_steps={self.cg_steps}"

    def _asked(self, steps: int) -> dict[str, Any]:
        for name in ("strength", "tolerance", "damping"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                checks.fail(TypeError, "IMAML", name, "a number", type(value).__name__)
            if not 0 <= value < float("inf") or (name == "strength" and value == 0):
                checks.fail(ValueError, "IMAML", name, "finite and positive", value)
        if isinstance(self.cg_steps, bool) or not isinstance(self.cg_steps, int):
            checks.fail(TypeError, "IMAML", "cg_steps", "an int", type(self.cg_steps).__name__)
        checks.at_least("IMAML", "cg_steps", self.cg_steps, 1)
        learned = self._rule().learned()
        if learned:
            raise ValueError(f"IMAML: rates must be fixed, because none gets a gradient, got learned {[*learned]}")
        return {"implicit": Implicit(self.strength, self.cg_steps, self.tolerance, self.damping, self._report)}

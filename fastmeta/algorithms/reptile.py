"""Reptile: the outer loop goes towards the adapted weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.output import MetaOutput, outputs_of
from fastmeta.engine.adaptation import Adaptation, adaptation
from fastmeta.engine.explain import Explanation
from fastmeta.engine.work import Work
from fastmeta.inner.rates import Rate
from fastmeta.tasks.batch import TaskBatch


class Reptile(MAML):
    """Reptile: ``d_theta = mean_t (theta - phi_K)``, which any ``torch.optim`` takes for a gradient.

    With ``torch.optim.SGD`` at rate ``epsilon`` a meta-step is the paper's batched version,
    ``theta <- theta + epsilon mean_t (phi_K - theta)``; its serial version is the same with batches of one task. The
    paper's other choice, Adam, is handed the same gradient. Every inner step takes the whole support set, of which the
    paper draws mini-batches.

    No query set is needed. ``loss.backward()`` leaves ``d_theta`` in ``grad``; the *value* of ``loss`` is something to
    watch, not what that is the derivative of: the mean query loss after adaptation where there is a query set, else the
    mean support loss before the last step. Task losses, outputs and support losses cannot be differentiated. Parameters
    that do not adapt get no gradient, and neither do rates. Weights are formed for each task. On a CPU the native
    executor passes over the sets, one task after the other, where it has the kernels and that takes less time, else the
    task-batched one; under ``torch.no_grad()`` meta-steps with a query set run as those of :class:`fastmeta.MAML` do.

    Args:
        model, loss, lr, steps: as :class:`fastmeta.MAML` has them; ``steps`` is at least 1, and more than 1 for
            something else than joint training.
        options: its other arguments but ``plan``, ``first_order``, ``memory_budget`` and ``update_running_stats``.

    Raises:
        TypeError: one of these is given.
        ValueError: a learned rate or hyper-parameter, or no inner step.

    Source: A. Nichol, J. Achiam, J. Schulman, 2018 (arXiv:1803.02999).
    """

    _batch_norms: ClassVar[tuple[str, ...]] = ("transductive", "running", "per_task")

    def __init__(
        self, model: nn.Module, loss: Callable[..., Any], lr: Rate | None = None, steps: int = 5, **options: Any
    ) -> None:
        refused = {"plan", "first_order", "memory_budget", "update_running_stats"} & options.keys()
        if refused:
            raise TypeError(f"Reptile: {sorted(refused)} must be left out, because there is no adjoint; use MAML")
        super().__init__(model, loss, lr, steps, plan="dense", **options)

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """Adapt to every task; ``out.loss.backward()`` gives ``mean_t (theta - phi_K)``.

        Args:
            tasks: the tasks, with a query set or without.
            steps: another number of inner steps than the module's, for evaluation.

        Returns:
            Losses and outputs; ``task_losses`` is what ``loss`` is the mean of, ``logits`` is ``None`` without a query
            set.

        Raises:
            ValueError: there is no inner step, a rate is learned, and as :meth:`fastmeta.MAML.forward`.
        """
        if not torch.is_grad_enabled() and isinstance(tasks, TaskBatch) and tasks.query is not None:
            return super().forward(tasks, steps=steps)
        work, found, output = self._towards(tasks, steps)
        theta = [p for p in work.theta if p.requires_grad]
        if torch.is_grad_enabled() and theta:
            mean: Tensor = _Towards.apply(output.loss, self._distances(work, found), *theta)
            output = output._replace(loss=mean)
        return output

    def value_and_grad(self, tasks: TaskBatch, *, steps: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of ``loss``, ``[]``, and ``mean_t (theta - phi_K)`` by name of each adapting parameter.

        Args:
            tasks: the tasks, with a query set or without.
            steps: another number of inner steps than the module's.

        Raises:
            As :meth:`forward`.
        """
        work, found, output = self._towards(tasks, steps)
        names = [name for name in work.packing.names if work.parameters[name].requires_grad]
        return output.loss, dict(zip(names, self._distances(work, found), strict=True))

    def explain(self, tasks: TaskBatch, *, steps: int | None = None) -> Explanation:
        """As :meth:`fastmeta.MAML.explain`, of the executor that adapts; the adjoint it counts does not run."""
        asked, self.executor = self.executor, "reference"
        try:
            table = super().explain(tasks, steps=steps)
        finally:
            self.executor = asked
        with torch.no_grad():
            work, programs = self._prepare(tasks, steps, differentiate=False, need_query=False, check_unused=False)
        if programs is None:
            return table
        why = programs.passes.objection(work)
        if why:
            return replace(table, executor=f"reference, because {why}")
        rows = tuple(replace(row, backend="native", saved=0, cotangents=0) for row in table.rows)
        how = "native, one task's pass after the other"
        return replace(table, executor=how, rows=rows, kept={}, kept_once=0, peak=0)

    def _towards(self, tasks: TaskBatch, steps: int | None) -> tuple[Work, Adaptation, MetaOutput]:
        learned = self._rule().learned()
        if learned:
            raise ValueError(f"Reptile: rates must be fixed, because none gets a gradient, got learned {[*learned]}")
        with torch.no_grad():
            evaluated = isinstance(tasks, TaskBatch) and tasks.query is not None
            work, programs = self._prepare(tasks, steps, differentiate=False, need_query=False)
            if work.steps == 0:
                raise ValueError("Reptile: steps must be at least 1, got 0: theta - phi_0 is zero")
            found = adaptation(work, programs, allow_unused=self.allow_unused)
            losses = found.support_losses[-1] if found.task_losses is None else found.task_losses
            logits = None
            if evaluated:
                logits = found.outputs if programs is None else outputs_of(programs.both[1], found.outputs or [])
            return work, found, MetaOutput(losses.mean(), losses, logits, found.support_losses, found.taken)

    @torch.no_grad()
    def _distances(self, work: Work, found: Adaptation) -> list[Tensor]:
        pairs = zip(work.theta, found.phi, strict=True)
        return [p - phi.mean(0) for p, phi in pairs if p.requires_grad]


class _Towards(torch.autograd.Function):
    """A number whose gradient to ``theta`` is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *theta: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[d * gradient for gradient in ctx.gradients]

"""How good an initialisation is: its figure over many tasks, before and after adaptation, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.algorithms.maml import MAML
from fastmeta.core import checks
from fastmeta.tasks import TaskSampler


class Stopped(Exception):
    """An evaluation was left unfinished because it was asked to stop."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks.

    Attributes:
        mean: the mean.
        ci95: half the width of its 95 % confidence interval, ``1.96 s / sqrt(n)``.
        tasks: n.
    """

    mean: float
    ci95: float
    tasks: int

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Of one value a task, ``[n]``, n at least 2."""
        checks.at_least("evaluate", "tasks", len(values), 2)
        values = values.to(torch.float64)
        return cls(float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values))), len(values))


@dataclass(frozen=True)
class Evaluation:
    """Figures of an initialisation on fresh tasks.

    Attributes:
        metric: ``"accuracy"`` (a share in [0, 1]) or ``"mse"``.
        before: the metric of the initialisation itself.
        after: the metric after adaptation to each task.
        loss: query loss after adaptation.
        steps: inner steps of the adaptation.
    """

    metric: str
    before: Estimate
    after: Estimate
    loss: float
    steps: int

    def better_than(self, value: float | None) -> bool:
        """Whether ``after`` beats ``value``; ``None`` is beaten by anything."""
        if value is None:
            return True
        return self.after.mean > value if self.metric == "accuracy" else self.after.mean < value


def evaluate(
    maml: MAML,
    sampler: TaskSampler,
    metric: str,
    *,
    tasks: int,
    steps: int,
    batch: int = 20,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Adapt to ``tasks`` tasks from ``sampler`` and judge each by its query set. No gradient is kept.

    PyTorch's generator is left as it was, so that evaluating does not change a training run with random layers.

    Args:
        maml: the learner.
        sampler: where the tasks come from.
        metric: ``"accuracy"`` or ``"mse"``.
        tasks: number of tasks.
        steps: inner steps.
        batch: tasks adapted at once.
        stop: asked between batches.

    Raises:
        Stopped: ``stop`` said so.
    """
    before, after, losses = [], [], []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for start in range(0, tasks, batch):
            if stop():
                raise Stopped
            episodes = sampler.sample(min(batch, tasks - start))
            targets = episodes.query[1]
            before.append(scores(metric, maml(episodes, steps=0).logits, targets))
            out = maml(episodes, steps=steps)
            after.append(scores(metric, out.logits, targets))
            losses.append(out.task_losses)
    return Evaluation(
        metric, Estimate.of(torch.cat(before)), Estimate.of(torch.cat(after)), float(torch.cat(losses).mean()), steps
    )


def scores(metric: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """The metric of each task, ``[T]``.

    Args:
        metric: ``"accuracy"`` or ``"mse"``.
        outputs: ``[T, N, ways]`` scores of classes, or ``[T, N, ...]`` predictions.
        targets: ``[T, N]`` labels, or ``[T, N, ...]`` values.
    """
    checks.one_of("evaluate", "metric", metric, ("accuracy", "mse"))
    if metric == "accuracy":
        return (outputs.argmax(-1) == targets).to(torch.float64).mean(1)
    return (outputs - targets).square().flatten(1).mean(1).to(torch.float64)

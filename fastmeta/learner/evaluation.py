"""How good an initialisation is: its figure over many tasks, before and after adaptation, with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmeta.algorithms.maml import MAML
from fastmeta.core import checks
from fastmeta.learner.metric import Metric, metric_of
from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.sampler import TaskSampler


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
        metric: what tasks are judged by.
        before: the metric of the initialisation itself.
        after: the metric after adaptation to each task.
        loss: query loss after adaptation.
        steps: inner steps of the adaptation.
    """

    metric: Metric
    before: Estimate
    after: Estimate
    loss: float
    steps: int

    def better_than(self, value: float | None) -> bool:
        """Whether ``after`` beats ``value``; ``None`` is beaten by anything."""
        return self.metric.better(self.after.mean, value)


def evaluate(
    maml: MAML,
    sampler: TaskSampler,
    metric: str | Metric,
    *,
    tasks: int,
    steps: int,
    batch: int = 20,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Adapt to ``tasks`` tasks from ``sampler`` and judge each by its query set. No gradient is kept.

    PyTorch's generators are left as they were, so that evaluating does not change a training run with random layers.

    Args:
        maml: the learner.
        sampler: where the tasks come from.
        metric: a name that :func:`~fastmeta.learner.metric.metric_of` knows, or a metric.
        tasks: number of tasks.
        steps: inner steps.
        batch: tasks adapted at once.
        stop: asked between batches.

    Raises:
        Stopped: ``stop`` said so.
    """
    return evaluate_batches(maml, drawn(sampler, tasks, batch), metric_of(metric), steps=steps, stop=stop)


def evaluate_batches(
    maml: MAML,
    batches: Iterable[TaskBatch],
    metric: Metric,
    *,
    steps: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """:func:`evaluate` on given batches; ``steps`` are the learner's own where left out.

    Raises:
        ValueError: fewer than two tasks in all.
        Stopped: ``stop`` said so.
    """
    steps = maml.steps if steps is None else steps
    device = next(maml.parameters()).device
    before, after, losses = [], [], []
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for tasks in batches:
            if stop():
                raise Stopped
            tasks = tasks.to(device)
            before.append(metric.score(maml(tasks, steps=0), tasks.query))
            out = maml(tasks, steps=steps)
            after.append(metric.score(out, tasks.query))
            losses.append(out.task_losses)
    checks.at_least("evaluate", "tasks", sum(map(len, losses)), 2)  # an interval needs two
    return Evaluation(
        metric, Estimate.of(torch.cat(before)), Estimate.of(torch.cat(after)), float(torch.cat(losses).mean()), steps
    )


def drawn(sampler: TaskSampler, tasks: int, batch: int) -> Iterator[TaskBatch]:
    """``tasks`` tasks from ``sampler``, ``batch`` at a time."""
    for start in range(0, tasks, batch):
        yield sampler.sample(min(batch, tasks - start))


def evaluation_record(kind: str, step: int, found: Evaluation) -> dict[str, Any]:
    """An evaluation as it goes into the log.

    Raises:
        ValueError: a figure is not finite.
    """
    record: dict[str, Any] = {
        "kind": kind, "step": step, "metric": found.metric.name, "loss": found.loss, "steps": found.steps,
        "tasks": found.after.tasks, "before": found.before.mean, "before_ci95": found.before.ci95,
        "after": found.after.mean, "after_ci95": found.after.ci95,
    }  # fmt: skip
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{kind}: {name} must be finite, got {value} at step {step}; lower the inner rate")
    return record

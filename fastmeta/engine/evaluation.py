"""What a meta-step is asked for and what it gives, whoever executes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastmeta.core.task_op import plus
from fastmeta.engine.work import Work


@dataclass(frozen=True)
class MetaGradient:
    """Gradients of a meta-loss: of the adapting parameters, of the others, and of the rates, each in its own shape."""

    adapted: list[Tensor]
    outer: list[Tensor | None]
    alpha: Tensor | None

    def __add__(self, other: MetaGradient) -> MetaGradient:
        """The gradient of two chunks of tasks."""
        adapted = [a + b for a, b in zip(self.adapted, other.adapted, strict=True)]
        outer = [plus(a, b) for a, b in zip(self.outer, other.outer, strict=True)]
        return MetaGradient(adapted, outer, plus(self.alpha, other.alpha))

    def scaled(self, factor: Tensor) -> MetaGradient:
        """The gradient of a meta-loss times ``factor``, ``[]``."""
        outer = [d if d is None else factor * d for d in self.outer]
        alpha = None if self.alpha is None else factor * self.alpha
        return MetaGradient([factor * d for d in self.adapted], outer, alpha)


@dataclass(frozen=True)
class Cotangents:
    """Derivatives of an outer objective.

    Attributes:
        losses: by each task's query loss, ``[T]``.
        outputs: by the query outputs, ``[T, ...]``, where it depends on them.
    """

    losses: Tensor
    outputs: Sequence[Tensor | None] = ()

    @staticmethod
    def of_mean(work: Work) -> Cotangents:
        """Those of the mean loss, eq. (4)."""
        return Cotangents(work.alpha.new_full((work.tasks,), 1 / work.tasks))

    def part(self, tasks: slice) -> Cotangents:
        """The same for some of the tasks."""
        return Cotangents(self.losses[tasks], [d if d is None else d[tasks] for d in self.outputs])


@dataclass(frozen=True)
class Evaluation:
    """What a meta-step gives.

    Attributes:
        losses: query loss of each task, ``[T]``.
        support_losses: ``[K, T]``, each before its step.
        outputs: the adapted model's output tensors on the query set, ``[T, ...]``; empty unless asked for.
        gradient: the meta-gradient, if cotangents were given.
        mutations: new buffer values, ``[T, ...]``, of each pass in order.
    """

    losses: Tensor
    support_losses: Tensor
    outputs: list[Tensor]
    gradient: MetaGradient | None
    mutations: list[dict[str, Tensor]]

    @property
    def meta_gradient(self) -> MetaGradient:
        """The gradient, where cotangents were given."""
        if self.gradient is None:
            raise RuntimeError("meta-step: gradient must have been asked for, got an evaluation without cotangents")
        return self.gradient

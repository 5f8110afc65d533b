"""What a meta-step is asked for and what it gives, whoever executes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fastmeta.core.task_op import plus
from fastmeta.engine.work import Work


@dataclass(frozen=True)
class Solution:
    """What came of the linear systems of some tasks.

    Attributes:
        residual: ``|b - A v| / |b|`` of each task, ``[T]``, computed anew from the solution; 0 where ``b`` is.
        iterations: of each task, ``[T]``.
        positive: whether every direction met had positive curvature, ``[T]``: where not, the task's iterations ended
            there, and the inner problem is no minimum.
        stationarity: ``|g + lambda (phi - theta)|`` of each task after its inner steps, ``[T]``.
    """

    residual: Tensor
    iterations: Tensor
    positive: Tensor
    stationarity: Tensor

    def beside(self, other: Solution) -> Solution:
        """Of these tasks and others."""
        return Solution(*(torch.cat(pair) for pair in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of it, in order."""
        return self.residual, self.iterations, self.positive, self.stationarity


@dataclass
class MetaGradient:
    """Gradients of a meta-loss, each in its own shape.

    By the adapting parameters, by the others, by the rates and by the inner rule's other hyper-parameters; and how well
    linear systems were solved for them, where there are such.
    """

    adapted: list[Tensor]
    outer: list[Tensor | None]
    alpha: Tensor | None
    hyper: Tensor | None = None
    solution: Solution | None = None

    def take(self, other: MetaGradient) -> None:
        """Make it the gradient of two chunks of tasks, where the other's for adapting parameters is that already."""
        self.adapted = other.adapted
        self.outer = added(self.outer, other.outer)
        self.alpha = plus(self.alpha, other.alpha)
        self.hyper = plus(self.hyper, other.hyper)
        if self.solution is not None and other.solution is not None:
            self.solution = self.solution.beside(other.solution)

    def scale(self, factor: Tensor) -> None:
        """Make it the gradient of the meta-loss times ``factor``, ``[]``, in place."""
        if factor.is_cpu and factor.item() == 1:  # elsewhere the question would make the processor wait for the device
            return
        every = (*self.adapted, *self.outer, self.alpha, self.hyper)
        torch._foreach_mul_([d for d in every if d is not None], factor)


def added(totals: Sequence[Tensor | None], parts: Sequence[Tensor | None], scale: int = 1) -> list[Tensor | None]:
    """``totals + scale * parts``, of which ``None`` is zero; a total is overwritten where none shares its memory."""
    places = Counter(total.untyped_storage()._cdata for total in totals if total is not None)

    def sum_of(total: Tensor | None, part: Tensor | None) -> Tensor | None:
        if total is None or part is None:
            return total if part is None else part * scale
        storage = total.untyped_storage()
        if places[storage._cdata] == 1 and storage.nbytes() == total.numel() * total.element_size():
            return total.add_(part, alpha=scale)
        return torch.add(total, part, alpha=scale)

    return [sum_of(total, part) for total, part in zip(totals, parts, strict=True)]


@dataclass(frozen=True)
class Cotangents:
    """Derivatives of an outer objective.

    Attributes:
        losses: by each task's query loss, ``[T]``; ``None`` where the objective is their mean, eq. (4).
        outputs: by the query outputs, ``[T, ...]``, where it depends on them.
    """

    losses: Tensor | None = None
    outputs: Sequence[Tensor | None] = ()

    def of_losses(self, work: Work, tasks: slice) -> Tensor:
        """By the losses of some of ``work``'s tasks."""
        if self.losses is None:
            return work.alpha.new_full((len(range(work.tasks)[tasks]),), 1 / work.tasks)
        return self.losses[tasks]

    def of_outputs(self, tasks: slice) -> list[Tensor | None]:
        """By the outputs of some of the tasks."""
        return [d if d is None else d[tasks] for d in self.outputs]


MEAN = Cotangents()


@dataclass
class Evaluation:
    """What a meta-step gives.

    Attributes:
        loss: mean query loss, ``[]``.
        losses: query loss of each task, ``[T]``; may be empty unless asked for.
        support_losses: ``[K, T]``, each before its step; may be empty unless asked for.
        outputs: the adapted model's output tensors on the query set, ``[T, ...]``; empty unless asked for.
        gradient: the meta-gradient, if cotangents were given.
        mutations: new buffer values, ``[T, ...]``, of each pass in order.
        taken: how many inner steps each task took, ``[T]``, where they may stop early.
    """

    loss: Tensor
    losses: Tensor
    support_losses: Tensor
    outputs: list[Tensor]
    gradient: MetaGradient | None
    mutations: list[dict[str, Tensor]]
    taken: Tensor | None = None

    def apart(self) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Evaluation]]:
        """All tensors, and what makes the same of others in their order."""
        gradient = self.gradient
        counts = len(self.outputs), 0 if gradient is None else len(gradient.adapted)
        others = [] if gradient is None else [*gradient.outer, gradient.alpha, gradient.hyper]
        given = [other is not None for other in others]
        solved = () if gradient is None or gradient.solution is None else gradient.solution.tensors()
        names = [tuple(values) for values in self.mutations]
        stops, differentiated = self.taken is not None, gradient is not None

        def together(tensors: Iterable[Tensor]) -> Evaluation:
            rest = iter(tensors)
            own = next(rest), next(rest), next(rest), list(islice(rest, counts[0]))
            again = None
            if differentiated:
                adapted = list(islice(rest, counts[1]))
                *outer, alpha, hyper = (next(rest) if there else None for there in given)
                solution = Solution(*islice(rest, len(solved))) if solved else None
                again = MetaGradient(adapted, outer, alpha, hyper, solution)
            moved = [{name: next(rest) for name in of_pass} for of_pass in names]
            return Evaluation(*own, again, moved, next(rest) if stops else None)

        tensors = [self.loss, self.losses, self.support_losses, *self.outputs]
        tensors += [] if gradient is None else gradient.adapted
        tensors += [other for other in others if other is not None]
        tensors += solved
        tensors += [value for values in self.mutations for value in values.values()]
        return [*tensors, *([] if self.taken is None else [self.taken])], together

    @property
    def meta_gradient(self) -> MetaGradient:
        """The gradient, where cotangents were given."""
        if self.gradient is None:
            raise RuntimeError("meta-step: gradient must have been asked for, got an evaluation without cotangents")
        return self.gradient

"""A meta-step chunk by chunk: results, and the meta-gradient while a chunk's tapes are still at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.engine.compiler import Programs
from fastmeta.engine.unroll import MetaGradient, adjoint, unroll
from fastmeta.engine.work import Work


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


def evaluate(
    work: Work, programs: Programs, cotangents: Cotangents | None, *, learned: bool, outputs: bool = False
) -> Evaluation:
    """Unroll every chunk of tasks and, with cotangents, run its adjoint; then its tapes are dropped.

    Args:
        work: the meta-step.
        programs: its programs.
        cotangents: of the objective whose gradient is wanted, or ``None`` for no gradient.
        learned: whether the rates get a gradient.
        outputs: whether the query outputs are wanted.
    """
    support, query = programs.both
    losses, support_losses, kept, mutations = [], [], [], []
    total: MetaGradient | None = None
    for chunk in programs.chunks(work.tasks):
        part = work.part(chunk)
        tapes = cotangents is not None and not work.first_order
        trajectory = unroll(part, support, query, keep_tapes=tapes, keep_gradients=cotangents is not None and learned)
        losses.append(trajectory.evaluated.loss)
        support_losses.append(trajectory.support_losses)
        mutations.append(trajectory.mutations)
        if outputs:
            kept.append(trajectory.evaluated.outputs)
        if cotangents is not None:
            d = cotangents.part(chunk)
            gradient = adjoint(part, support, query, trajectory, d.losses, d.outputs)
            total = gradient if total is None else total + gradient
    return Evaluation(
        torch.cat(losses),
        torch.cat(support_losses, 1),
        [torch.cat(pieces) for pieces in zip(*kept, strict=True)],
        total,
        _joined(mutations),
    )


def _joined(chunks: Sequence[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    passes = zip(*chunks, strict=True)
    return [{name: torch.cat([m[name] for m in pieces]) for name in pieces[0]} for pieces in passes]

"""Adaptation alone: every task's weights after the inner loop, without meta-gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmeta.engine import autodiff
from fastmeta.engine.compiler import Programs
from fastmeta.engine.profile import watching
from fastmeta.engine.runs import Running
from fastmeta.engine.timed import INNER_LOOP, QUERY
from fastmeta.engine.unroll import unroll
from fastmeta.engine.work import Work


@dataclass(frozen=True)
class Adaptation:
    """Weights of every task after K steps.

    Attributes:
        phi: adapting parameters in the packing's order, ``[T, *shape]``.
        support_losses: ``[K, T]``, each before its step.
        task_losses: query loss of each task, ``[T]``; ``None`` without a query set.
        outputs: the model's output tensors on the query set, ``[T, ...]``, or by autodiff the pytree of them; ``None``
            without a query set.
        taken: how many inner steps each task took, ``[T]``, where they may stop early.
        statistics: running statistics of each task's own, ``[T, ...]``, where it has such.
    """

    phi: list[Tensor]
    support_losses: Tensor
    task_losses: Tensor | None
    outputs: list[Tensor] | None
    taken: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def adaptation(work: Work, programs: Programs | None, *, allow_unused: bool) -> Adaptation:
    """Adapt every task, and evaluate its query set where there is one; nothing is kept for an adjoint.

    Args:
        work: the meta-step.
        programs: its programs; ``None`` for autodiff.
        allow_unused: for autodiff, as :func:`autodiff.run` has it.
    """
    runs = watching()
    if runs is None:
        return _adaptation(work, programs, allow_unused)
    with runs.meta_step(work, programs, gradient=False) as running:
        return _adaptation(work, programs, allow_unused, running)


def _adaptation(
    work: Work, programs: Programs | None, allow_unused: bool, running: Running | None = None
) -> Adaptation:
    why = "" if programs is None else programs.passes.objection(work)
    if running is not None:
        running.by("autodiff" if programs is None else "reference" if why else "native", why)
    if programs is None:
        result = autodiff.run(work, keep_buffers=False, allow_unused=allow_unused)
        packed, losses = result.phi, result.support_losses
        evaluated, outputs = result.task_losses, result.outputs
        taken, statistics = result.taken, result.statistics
    else:
        trajectories = [
            unroll(
                part,
                programs.support if running is None else running.timed(programs.support, INNER_LOOP, part.tasks),
                programs.query
                if running is None or programs.query is None
                else running.timed(programs.query, QUERY, part.tasks),
                keep_tapes=False,
                keep_records=False,
                again_from=(),
                native=None if why else programs.passes,
            )
            for part in map(work.part, programs.chunks(work.tasks))
        ]
        packed = torch.cat([trajectory.phi.packed for trajectory in trajectories])
        losses = torch.cat([trajectory.support_losses for trajectory in trajectories], 1)
        evaluated, outputs = None, None
        taken = None if work.stop is None else torch.cat([t.taken for t in trajectories if t.taken is not None])
        statistics = {name: torch.cat([t.statistics[name] for t in trajectories]) for name in work.own_statistics}
        if programs.query is not None:
            evaluated = torch.cat([trajectory.losses for trajectory in trajectories])
            pieces = zip(*[trajectory.evaluated.outputs for trajectory in trajectories], strict=True)
            outputs = [torch.cat(each) for each in pieces]
    return Adaptation(work.packing.unpack(packed.contiguous()), losses, evaluated, outputs, taken, statistics)

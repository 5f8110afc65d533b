"""The unrolled inner loop, eq. (2)-(4), and its adjoint, eq. (5)-(8'). No autograd graph of the loop exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta.core.task_op import plus
from fastmeta.engine import executor, running_stats
from fastmeta.engine.clipping import clipped, clipped_adjoint
from fastmeta.engine.evaluation import MetaGradient, added
from fastmeta.engine.executor import Gradients, Invariants, Tape
from fastmeta.engine.fast_weights import FastWeights, Vector, Weight
from fastmeta.engine.inner_passes import InnerPasses
from fastmeta.engine.native_passes import NativePasses
from fastmeta.engine.program import Program
from fastmeta.engine.work import Work, require_finite


@dataclass
class Trajectory:
    """What the unroll leaves: results, and what the adjoint needs.

    Attributes:
        phi: adapted parameters after K steps.
        support_losses: ``[K, T]``, each before its step.
        tapes: one a step, if kept: operands and cotangents of every operation.
        points: ``phi_k``, one a step, if kept: what tapes can be computed from again.
        passes: over the support sets.
        records: what the inner rule wants of each step, if kept: for rates or hyper-parameters that are learned, or for
            every adjoint of a rule that is entrywise.
        query: the query pass after all steps.
        unclipped: gradients as they were before they were clipped, one a step, if kept.
        going: which tasks took each step, ``[T, 1]``, where they may stop.
        taken: how many steps each task took, ``[T]``; ``None`` where that is all.
        statistics: running statistics of each task's own, ``[T, ...]``, where it has such.
        looks: by the number of steps before the last, the gradients of query losses that count then.
        looked: their weighted losses, ``[T]`` each.
        weight: of the last query loss; ``None`` for 1.
        mutations: new buffer values, ``[T, ...]``, of each pass in order.
    """

    phi: Vector
    support_losses: Tensor
    tapes: list[Tape] = field(default_factory=list)
    points: list[Vector] = field(default_factory=list)
    passes: InnerPasses | None = None
    records: list[Any] = field(default_factory=list)
    query: Tape | None = None
    unclipped: list[Vector] = field(default_factory=list)
    going: list[Tensor] = field(default_factory=list)
    taken: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    looks: dict[int, Gradients] = field(default_factory=dict)
    looked: list[Tensor] = field(default_factory=list)
    weight: float | None = None
    mutations: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def inner(self) -> InnerPasses:
        """The passes over the support sets."""
        if self.passes is None:
            raise RuntimeError("trajectory: there must be passes over support sets, got none")
        return self.passes

    @property
    def evaluated(self) -> Tape:
        """The query pass, where there was one."""
        if self.query is None:
            raise RuntimeError("trajectory: query must have been evaluated, got an unroll that only adapts")
        return self.query

    @property
    def losses(self) -> Tensor:
        """Each task's loss, ``[T]``."""
        last = self.evaluated.loss if self.weight is None else self.evaluated.loss * self.weight
        return torch.stack([*self.looked, last]).sum(0) if self.looked else last


def unroll(
    work: Work,
    support: Program,
    query: Program | None,
    *,
    keep_tapes: bool,
    keep_records: bool,
    keep_points: bool = False,
    again_from: Sequence[int] | None = None,
    d_loss: Tensor | None = None,
    native: NativePasses | None = None,
) -> Trajectory:
    """Adapt every task by K steps, eq. (2)-(3), and evaluate its query set.

    Args:
        work: the meta-step.
        support: program at the support shapes.
        query: program at the query shapes, or ``None`` to adapt only.
        keep_tapes: keep each step's tape for the Hessian-vector products.
        keep_records: keep of each step what gradients to the inner rule's rates and hyper-parameters are made of, and
            all that the adjoint of an entrywise rule is.
        keep_points: keep what each step's tape can be computed from again.
        again_from: where the query pass is computed again from, as in :func:`executor.forward`.
        d_loss: cotangent of each task's loss, ``[T]``, if query losses before the last step count and gradients are
            wanted: they are taken at once, so that no query pass is kept but the last.
        native: what passes over the sets instead of the programs, where nothing is kept.
    """
    rule = FastWeights(work, support)
    phi, state = rule.start(), None
    losses, trajectory = list[Tensor](), Trajectory(phi, phi.packed)
    passes = trajectory.passes = InnerPasses(work, support, rule, native)
    trajectory.weight = None if work.query_weights is None else work.weights[-1]
    trajectory.statistics = running_stats.start(work)
    seen: Invariants | None = None  # of the query's passes
    going: Tensor | None = None  # which tasks go on
    for k, weight in enumerate(work.weights[: work.steps]):
        if query is not None and weight:
            adapted = rule.values(phi) if k else work.theta
            look = _look(work, query, adapted, k, trajectory.statistics, seen, again_from)
            seen = look.invariants
            trajectory.looked.append(look.loss * weight)
            if d_loss is not None:
                trajectory.looks[k] = executor.backward(query, look, d_loss * weight, last=True)
            del look
        passed = passes.run(phi, k, keep=keep_tapes)
        g, before = passed.g, going
        if work.implicit is not None:
            g = proximal(work, rule.values(phi), g)
        losses.append(passed.loss if before is None else torch.where(before[:, 0], passed.loss, losses[-1]))
        trajectory.mutations += passed.mutations
        if work.batch_norm == "per_task":
            trajectory.statistics = running_stats.followed(
                support, work.buffers, trajectory.statistics, passed.mutations, before
            )
        if work.stop is not None:
            going = work.stop.reached(passed.loss, g).logical_not().unsqueeze(1)  # type: ignore[arg-type]  # all formed
            going = going if before is None else going & before
            if _all_done(work, going):
                rest = work.steps - k - 1
                losses += losses[-1:] * rest
                trajectory.mutations += passed.mutations * rest  # of passes that no task has
                break
            trajectory.going.append(going)
        if work.clip_norm is not None:
            if keep_tapes or keep_points:
                trajectory.unclipped.append(rule.vector(g))
            g = clipped(g, work.clip_norm)
        if keep_points:
            trajectory.points.append(phi)
        forth = rule.step(phi, state, g, k, keep=keep_records)
        state = forth.state
        phi = forth.phi if going is None else Vector(torch.where(going, forth.phi.packed, phi.packed), {})
        if passed.tape is not None:
            trajectory.tapes.append(passed.tape)
        if keep_records:
            trajectory.records.append(forth.record)
        del passed, g, forth  # what is not kept must be gone before the next step
    del state
    trajectory.phi = phi
    trajectory.support_losses = torch.stack(losses) if losses else work.alpha.new_empty((0, work.tasks))
    if work.stop is not None:
        none = torch.zeros(work.tasks, dtype=torch.int64, device=phi.packed.device)
        trajectory.taken = sum((each[:, 0].long() for each in trajectory.going), none)
    if query is not None and native is not None and native.answers(work):
        trajectory.query = native.over_query(work, rule.values(phi), first=not work.steps)  # type: ignore[arg-type]  # all formed
    elif query is not None:
        adapted = rule.values(phi) if work.steps else work.theta
        trajectory.query = _look(work, query, adapted, work.steps, trajectory.statistics, seen, again_from)
    if trajectory.query is not None:
        trajectory.mutations.append(trajectory.query.mutations)
        if work.check_finite:
            require_finite(trajectory.query.loss, "query loss")
    return trajectory


def adjoint(
    work: Work,
    support: Program,
    query: Program,
    trajectory: Trajectory,
    d_loss: Tensor,
    d_outputs: Sequence[Tensor | None] = (),
    onto: Sequence[Tensor | None] = (),
) -> MetaGradient:
    """Meta-gradient by the adjoint of the unroll, eq. (5)-(8').

    Args:
        work: the meta-step.
        support: its program at the support shapes.
        query: its program at the query shapes.
        trajectory: of :func:`unroll`, with tapes or points unless first order, with records where the rule is
            entrywise; it is used up.
        d_loss: cotangent of each task's query loss, ``[T]``: ``1 / T`` for the mean of eq. (4).
        d_outputs: cotangents of the query outputs, where something else than the loss depends on them.
        onto: gradients of the adapting parameters from other tasks, to which those of these are added; they are
            overwritten. ``None`` for one that there is none of.
    """
    rule = FastWeights(work, support)
    if work.query_weights is not None:
        d_loss = d_loss * work.weights[-1]
    gradients = executor.backward(query, trajectory.evaluated, d_loss, d_outputs, last=True)
    trajectory.query = None
    lam, outer = rule.vector(gradients.adapted), _in_rows(work, query.outer, gradients.outer, work.steps)
    del gradients  # packed, it is there twice
    state, d_alpha, d_hyper = None, list[Tensor](), None
    for k in range(work.steps - 1, -1, -1):
        look = trajectory.looks.pop(k, None)
        if work.stop is not None and k >= len(trajectory.going):  # no task took this step
            continue
        stays = None
        if trajectory.going:
            going = trajectory.going.pop()
            stays = Vector(lam.packed.masked_fill(going, 0), {})
            lam = Vector(lam.packed.masked_fill(going.logical_not(), 0), {})
        back = rule.adjoint(lam, state, trajectory.records.pop() if trajectory.records else None, k)
        lam, state, d_hyper = back.lam, back.state, plus(d_hyper, back.d_hyper)
        if back.d_alpha is not None:
            d_alpha.append(back.d_alpha)
        if not work.first_order:
            u = back.u
            if trajectory.unclipped and work.clip_norm is not None:
                g = trajectory.unclipped.pop()
                u = Vector(clipped_adjoint(u.packed, g.packed, work.clip_norm), {})
                del g
            tape = trajectory.tapes.pop() if trajectory.tapes else None
            point = trajectory.points.pop() if trajectory.points else None
            product = trajectory.inner.product(tape, point, k, rule.values(u, beside=trajectory.phi))
            lam = rule.less(lam, product.adapted, alone=state is None)
            outer = added(outer, _in_rows(work, support.outer, product.outer, k), -1)
            del tape, point, product, back, u  # before the next step's are there
        if stays is not None:
            lam = rule.plus(lam, stays)
        if look is not None:
            lam = rule.plus(lam, rule.vector(look.adapted))
            outer = added(outer, _in_rows(work, query.outer, look.outer, k))
    once = trajectory.inner.invariant_outer()
    if once is not None:
        outer = added(outer, once, -1)
    return MetaGradient(rule.over_tasks(lam, onto), outer, _stack_rates(work.alpha, d_alpha[::-1]), d_hyper)


def proximal(work: Work, phi: Sequence[Weight], g: Sequence[Weight]) -> list[Weight]:
    """``g + lambda (phi - theta)``: the gradient of the proximal inner problem, eq. (23)."""
    strength = 0.0 if work.implicit is None else work.implicit.strength
    every = zip(phi, g, work.theta, strict=True)
    return [torch.add(d, w - p, alpha=strength) for w, d, p in every]  # type: ignore[arg-type, operator]  # all formed


def _look(
    work: Work,
    query: Program,
    adapted: Sequence[Weight],
    k: int,
    statistics: dict[str, Tensor],
    invariants: Invariants | None,
    again: Any,
) -> Tape:
    """The query pass after k steps."""
    data = pytree.tree_leaves(work.query)
    return executor.forward(
        query,
        adapted,
        work.fixed(k) | statistics,
        data,
        first=k == 0,
        invariants=None if again is not None else invariants,
        again_from=again,
    )


def _all_done(work: Work, going: Tensor) -> bool:
    """Whether no task goes on, and nothing else of the loop is wanted; where asking makes no one wait for a device."""
    return going.is_cpu and work.query_weights is None and not bool(going.any())


def _in_rows(work: Work, names: Sequence[str], outer: Sequence[Tensor | None], k: int) -> list[Tensor | None]:
    """Gradients of passes after k steps, each in its parameter's own shape: what comes stepwise has rows."""
    if not work.stepwise:
        return list(outer)
    placed = []
    for name, d in zip(names, outer, strict=True):
        if d is not None and name in work.stepwise:
            rows = torch.zeros_like(work.parameters[name])
            rows[work.row(name, k)] = d
            d = rows
        placed.append(d)
    return placed


def _stack_rates(alpha: Tensor, steps: list[Tensor]) -> Tensor | None:
    """Gradient in alpha's shape: one row a step, or their sum where all steps share one."""
    if not steps:
        return None
    rows = torch.stack([step.reshape(alpha.shape[1:]) for step in steps])
    if alpha.shape[0] == 1:
        return rows.sum(0, keepdim=True)
    return torch.cat([rows, rows.new_zeros(alpha.shape[0] - rows.shape[0], *alpha.shape[1:])])

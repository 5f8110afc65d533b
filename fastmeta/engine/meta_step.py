"""A meta-step by the executor that can run it; the reference goes chunk by chunk and drops each chunk's tapes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastmeta.engine.budget import fit_to_budget, warn
from fastmeta.engine.capture import objection
from fastmeta.engine.compiler import Fit, Programs
from fastmeta.engine.evaluation import Cotangents, Evaluation, MetaGradient
from fastmeta.engine.implicit import implicit_gradient
from fastmeta.engine.native import NativeStep
from fastmeta.engine.profile import watching
from fastmeta.engine.runs import Running
from fastmeta.engine.timed import ADJOINT, INNER_LOOP, QUERY
from fastmeta.engine.unroll import adjoint, unroll
from fastmeta.engine.work import Work
from fastmeta.inner.early_stop import NEVER


def evaluate(
    work: Work, programs: Programs, cotangents: Cotangents | None, *, learned: bool, outputs: bool = False
) -> Evaluation:
    """Adapt to and evaluate every task and, with cotangents, run the adjoint.

    Args:
        work: the meta-step.
        programs: its programs.
        cotangents: of the objective whose gradient is wanted, or ``None`` for no gradient.
        learned: whether the inner rule's rates and hyper-parameters get a gradient.
        outputs: whether the losses of each task and the query outputs are wanted beside the mean loss.

    Raises:
        RuntimeError: the native executor was asked for and cannot run this.
    """
    runs = watching()
    if runs is None:
        found = _evaluate(work, programs, cotangents, learned, outputs)
    else:
        with runs.meta_step(work, programs, gradient=cotangents is not None) as running:
            found = _evaluate(work, programs, cotangents, learned, outputs, running)
    if work.implicit is not None and found.gradient is not None:
        work.implicit.report[:] = [found.gradient.solution]
    return found


def _evaluate(
    work: Work,
    programs: Programs,
    cotangents: Cotangents | None,
    learned: bool,
    outputs: bool,
    running: Running | None = None,
) -> Evaluation:
    step = programs.native
    call = step if isinstance(step, str) else step.call(work, cotangents, learned=learned, outputs=outputs)
    if isinstance(call, str) and work.executor == "native":
        raise RuntimeError(f"MAML: executor 'native' is not available here: {call}")
    fit = fitted(work, programs, cotangents, native=not isinstance(call, str), learned=learned, outputs=outputs)
    if not isinstance(call, str) and fit is None:
        if running is not None:
            running.by("resident" if work.alpha.is_cuda else "native")
        return call.run(work, cotangents)
    captured = work.alpha.is_cuda and not objection(work) and not (running is not None and running.operations)
    if running is not None:
        why = call if isinstance(call, str) else "one task alone would take more than the memory budget natively"
        running.by("captured" if captured else "reference", why)
    timed = None if captured else running

    def execute(work: Work, cotangents: Cotangents | None) -> Evaluation:
        return _by_reference(work, programs, cotangents, fit, learned=learned, outputs=outputs, running=timed)

    while True:
        try:
            if captured:
                kind = programs.kind(fit, learned=learned, outputs=outputs)
                return programs.captures.run(kind, work, cotangents, execute)
            return execute(work, cotangents)
        except torch.OutOfMemoryError:
            _run_fewer(programs, min(work.tasks, programs.chunk_size))


def fitted(
    work: Work, programs: Programs, cotangents: Cotangents | None, *, native: bool, learned: bool, outputs: bool
) -> Fit | None:
    """How the task-batched executor keeps within the memory budget, found out once a kind.

    ``None`` without a budget, and where the native executor can run: unless one task alone is too much for the budget
    there and not here.
    """
    budget = work.memory_budget
    if budget is None:
        return None
    least = 0
    if native and isinstance(programs.native, NativeStep):
        least = programs.native.least_bytes(work, learned=learned)
    found = None
    if not native or (least > budget and work.executor == "auto"):
        settings = budget, work.tasks, work.steps, work.first_order, work.rule, work.clip_norm, programs.chunk_size
        kind = *settings, work.stop, work.micro_batches, cotangents is None, learned, outputs
        found = programs.room.fits.get(kind)
        if found is None:
            found = predicted(work, programs, cotangents, learned=learned, outputs=outputs)
            programs.room.fits[kind] = found
        if native and found.peak > budget:
            found = None
    peak = least if found is None else found.peak
    if peak > budget and not programs.room.warned:
        programs.room.warned = True
        warn(budget, peak)
    return found


def predicted(work: Work, programs: Programs, cotangents: Cotangents | None, *, learned: bool, outputs: bool) -> Fit:
    """How the task-batched executor runs a meta-step, within the memory budget if there is one."""

    def run(part: Work, at_once: int, recompute: bool) -> Evaluation:
        tried = Fit(at_once, recompute, 0)
        return _by_reference(part, programs, cotangents, tried, learned=learned, outputs=outputs)

    if work.stop is not None:
        work = replace(work, stop=NEVER)  # tasks that end early would take less than others will
    gradient = cotangents is not None
    return fit_to_budget(work, programs, run, gradient=gradient, outputs=outputs, budget=work.memory_budget)


def _run_fewer(programs: Programs, tasks: int) -> None:
    """After ``tasks`` at a time did not fit into memory: half as many from now on. Called while that is handled."""
    if tasks <= 1:
        raise
    programs.room.tasks = tasks // 2
    warnings.warn(
        f"MAML: {tasks} tasks at a time do not fit into the GPU's memory; {tasks // 2} run at a time from now on. "
        f"chunk_size={tasks // 2} asks for that at once",
        stacklevel=5,
    )


@torch.no_grad()
def _by_reference(
    work: Work,
    programs: Programs,
    cotangents: Cotangents | None,
    fit: Fit | None,
    *,
    learned: bool,
    outputs: bool,
    running: Running | None = None,
) -> Evaluation:
    support, query = programs.both
    backward_support = support  # what the adjoint runs
    recompute = fit is not None and fit.recompute
    again = recompute or work.micro_batches > 1
    back = adjoint if work.implicit is None else implicit_gradient
    losses, support_losses, kept, mutations, ended = [], [], [], [], []
    total: MetaGradient | None = None
    for chunk in programs.chunks(work.tasks, None if fit is None else fit.tasks):
        part, taken = work.part(chunk), None
        if programs.rows is not None:
            taken = programs.rows.take(part)
            part = taken.work
        if running is not None:
            timed = [running.timed(programs.support, p, part.tasks) for p in (INNER_LOOP, ADJOINT)]
            support, backward_support = timed
            query = running.timed(programs.both[1], QUERY, part.tasks)
        second_order = cotangents is not None and not work.first_order and work.implicit is None
        trajectory = unroll(
            part,
            support,
            query,
            keep_tapes=second_order and not again,
            keep_records=cotangents is not None and (learned or work.rule.entrywise),
            keep_points=second_order and again,
            again_from=() if cotangents is None else query.segments if recompute else None,
            d_loss=None if cotangents is None else cotangents.of_losses(work, chunk),
        )
        losses.append(trajectory.losses)
        support_losses.append(trajectory.support_losses)
        mutations.append(trajectory.mutations)
        ended += [] if trajectory.taken is None else [trajectory.taken]
        if outputs:
            kept.append(trajectory.evaluated.outputs)
        if cotangents is not None:
            trajectory.inner.support = backward_support
            d_losses, d_outputs = cotangents.of_losses(work, chunk), cotangents.of_outputs(chunk)
            earlier: Sequence[Tensor | None] = () if total is None else total.adapted
            if taken is not None:
                gradient = back(part, backward_support, query, trajectory, d_losses, d_outputs, taken.as_it_is(earlier))
                total = taken.added(total, gradient)
            else:
                gradient = back(part, backward_support, query, trajectory, d_losses, d_outputs, earlier)
                if total is None:
                    total = gradient
                else:
                    total.take(gradient)
            del gradient
        del trajectory, taken  # its query tape must be gone before the next chunk
    every = torch.cat(losses)
    return Evaluation(
        every.mean(),
        every,
        torch.cat(support_losses, 1),
        [torch.cat(pieces) for pieces in zip(*kept, strict=True)],
        total,
        _joined(mutations),
        torch.cat(ended) if ended else None,
    )


def _joined(chunks: Sequence[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    passes = zip(*chunks, strict=True)
    return [{name: torch.cat([m[name] for m in pieces]) for name in pieces[0]} for pieces in passes]

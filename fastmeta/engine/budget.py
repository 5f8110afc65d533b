"""A memory budget: how many tasks run at a time, and whether activations are kept or computed again, so that it holds.

The task-batched executor's memory is predicted from what it takes for one task, for two at a time and for two one after
the other, whose tensors are counted while they run: beyond that it grows by the same amount a task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

from fastmeta.core.live_bytes import Exceeded, LiveBytes
from fastmeta.engine.compiler import Fit, Programs
from fastmeta.engine.work import Work

Run = Callable[[Work, int, bool], object]  # a meta-step; how many tasks at a time; whether activations come again


@dataclass(frozen=True)
class Peak:
    """The most memory that a meta-step holds beside its parameters and tasks, by the number of tasks at a time.

    Attributes:
        first: bytes with one task.
        more: bytes with each further one.
        tasks: T.
        apart: bytes that tasks of several runs add: what is held of the gradient of those that are done.
        left: bytes that a task which is done leaves: its outputs.
    """

    first: int
    more: int
    tasks: int
    apart: int
    left: int

    @staticmethod
    def of(
        work: Work,
        programs: Programs,
        run: Run,
        *,
        recompute: bool,
        outputs: bool,
        limit: int | None = None,
    ) -> Peak:
        """Run one task, two at a time and two in turn, and count, up to ``limit`` bytes."""
        counted = []
        devices = [work.alpha.device] if work.alpha.is_cuda else []
        for count, at_once in ((1, 1), (2, 2), (2, 1))[: 1 if work.tasks == 1 else 3]:
            part = work.part(slice(0, count))
            live = LiveBytes(limit)
            try:
                with torch.random.fork_rng(devices), live:
                    run(part, at_once, recompute)
            except Exceeded:
                pass  # and the peak is beyond the limit
            except torch.OutOfMemoryError:
                if limit is None:
                    raise
                live.peak = limit + 1
            counted.append(live.peak)
            if limit is not None and counted[0] > limit:
                break  # where it stopped says nothing of how much more there would be
        graph = programs.both[1].graph
        shown = [graph.values[slot] for slot in graph.outputs] if outputs else []
        left = sum(prod(v.shape) * v.dtype.itemsize for v in shown)
        first, both, in_turn = counted if len(counted) == 3 else counted * 3
        return Peak(first, max(0, both - first), work.tasks, max(0, in_turn - first - left), left)

    def at(self, tasks: int) -> int:
        """Bytes where so many run at a time."""
        others = self.apart if tasks < self.tasks else 0
        return self.first + (tasks - 1) * self.more + others + (self.tasks - tasks) * self.left

    def most(self, budget: int, limit: int) -> int:
        """How many tasks at a time ``budget`` bytes allow, at most ``limit``; 0 where not even one fits."""
        return next((self.even(tasks) for tasks in range(limit, 0, -1) if self.at(tasks) <= budget), 0)

    def even(self, most: int) -> int:
        """The tasks at a time of runs that are as even as they can be, at most ``most`` each."""
        runs = -(-self.tasks // most)
        return -(-self.tasks // runs)


def fit_to_budget(
    work: Work, programs: Programs, run: Run, *, gradient: bool, outputs: bool, budget: int | None = None
) -> Fit:
    """How the task-batched executor keeps within ``budget``; where it cannot, one task runs at a time.

    Activations are computed again where keeping one task's does not fit; on a GPU, where calls are what is dear, also
    where it lets twice as many tasks run at a time. What draws random numbers cannot be computed again.

    Args:
        work: the meta-step.
        programs: its programs.
        run: runs it.
        gradient: whether the meta-gradient is wanted.
        outputs: whether the query outputs are.
        budget: bytes; ``None`` for no limit.
    """

    def peak(*, recompute: bool, limit: int | None) -> Peak:
        return Peak.of(work, programs, run, recompute=recompute, outputs=outputs, limit=limit)

    planned = min(programs.chunk_size, work.tasks)
    kept = peak(recompute=False, limit=budget)
    if budget is None:
        return Fit(kept.even(planned), recompute=False, peak=kept.at(kept.even(planned)))
    most = kept.most(budget, planned)
    repeats = gradient and not programs.random
    if repeats and (most == 0 or (work.alpha.is_cuda and 2 * most <= planned)):
        again = peak(recompute=True, limit=budget)
        tasks = again.most(budget, planned)
        if tasks >= max(1, 2 * most):
            return Fit(tasks, recompute=True, peak=again.at(tasks))
    if most > 0:
        return Fit(most, recompute=False, peak=kept.at(most))
    return Fit(1, recompute=repeats, peak=peak(recompute=repeats, limit=None).at(1))


def warn(budget: int, least: int) -> None:
    """Say that a budget is too small. Called by what the meta-step's methods call."""
    warnings.warn(
        f"MAML: memory_budget is {budget} bytes, but one task at a time takes {least}: a budget of that size would do, "
        "or fewer inner steps, or smaller sets",
        stacklevel=5,
    )

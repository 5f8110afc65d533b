"""A program whose operations' maps are timed: the same operations, copied, with a clock around each of their maps.

The executor runs it as any other program and knows nothing of it, so that without a profile there is no clock to ask
for, and nothing is called that would not be called otherwise.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmeta.core.task_op import TaskOp
from fastmeta.engine.cost import MAPS
from fastmeta.engine.program import Instruction, Program

Ranges = Callable[[str], AbstractContextManager[Any]]
PENDING = 4096  # pairs of events after which those that have passed are read

# Parts of a meta-step.
INNER_LOOP, QUERY, ADJOINT = "inner loop", "query", "adjoint"


@dataclass
class Tally:
    """Calls of one map: how many, for how many tasks in all, and the seconds that they took."""

    calls: int = 0
    tasks: int = 0
    seconds: float = 0.0


class _Own(threading.local):
    """What each thread has for itself: its meta-step may run beside those of others."""

    def __init__(self) -> None:
        self.busy = Tally()
        self.tasks = 1
        self.within = False


class Clock:
    """Seconds of pieces of work, by the processor's clock, or on a GPU by events on the current stream.

    Events are read once the device has passed them; :meth:`settle` waits for those that are left.

    Attributes:
        own: of this thread: seconds of all its maps so far (``busy``), how many tasks the calls are for (``tasks``),
            and whether a map runs, for what it calls in turn is part of it (``within``).
        ranges: names work for tracers, if any listens.
    """

    def __init__(self, ranges: Ranges | None = None) -> None:
        self.own = _Own()
        self.ranges: Ranges = ranges if ranges is not None else lambda name: nullcontext()
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event, tuple[Tally, ...]]] = []

    def begin(self, cuda: bool) -> Any:
        """What :meth:`end` wants."""
        return _event() if cuda else time.perf_counter()

    def end(self, begin: Any, *tallies: Tally) -> None:
        """Add the time since ``begin`` to each of ``tallies``."""
        if isinstance(begin, float):
            seconds = time.perf_counter() - begin
            for tally in tallies:
                tally.seconds += seconds
        else:
            self._pending.append((begin, _event(), tallies))
            if len(self._pending) % PENDING == 0:
                self._read(wait=False)

    def settle(self) -> None:
        """Wait for what is under way, and count it."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self._read(wait=True)

    def _read(self, wait: bool) -> None:
        left = []
        for begin, end, tallies in self._pending:
            if wait:
                end.synchronize()
            elif not end.query():
                left.append((begin, end, tallies))
                continue
            seconds = begin.elapsed_time(end) / 1e3
            for tally in tallies:
                tally.seconds += seconds
        self._pending = left


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class TimedProgram:
    """A program and the tallies of its operations' maps in one part of a meta-step.

    Args:
        program: any.
        part: of the meta-step, such as ``inner loop``.
        clock: that all programs of a profile share.
        cuda: whether it runs on a GPU.

    Attributes:
        program: the same with clocks.
        part: as given.
    """

    def __init__(self, program: Program, part: str, clock: Clock, *, cuda: bool) -> None:
        self.part = part
        self._original = program
        self._tallies = [[Tally() for _ in MAPS] for _ in program.instructions]
        every = zip(program.instructions, self._tallies, strict=True)
        timed = tuple(replace(i, op=_timed(i, tallies, clock, cuda)) for i, tallies in every)
        self.program = replace(program, instructions=timed)

    def counted(self) -> Iterator[tuple[int, Instruction, int, Tally]]:
        """Position, instruction, number of the map, and tally of every map that ran."""
        for i, (instruction, tallies) in enumerate(zip(self._original.instructions, self._tallies, strict=True)):
            for number, tally in enumerate(tallies):
                if tally.calls:
                    yield i, instruction, number, tally


def _timed(instruction: Instruction, tallies: list[Tally], clock: Clock, cuda: bool) -> TaskOp:
    """A copy of the operation that hides its class's maps behind timed ones."""
    op = copy.copy(instruction.op)
    for name, tally in zip(MAPS, tallies, strict=True):
        label = f"{instruction.module or instruction.op.name} {instruction.op.name} {name}"
        setattr(op, name, _watched(getattr(op, name), tally, clock, cuda, label, instruction.later.single))
    return op


def _watched(
    run: Callable[..., Any], tally: Tally, clock: Clock, cuda: bool, label: str, single: bool
) -> Callable[..., Any]:
    def watched(*args: Any) -> Any:
        own = clock.own
        if own.within:
            return run(*args)
        own.within = True
        try:
            with clock.ranges(label):
                begin = clock.begin(cuda)
                result = run(*args)
                clock.end(begin, tally, own.busy)
        finally:
            own.within = False
        tally.calls += 1
        tally.tasks += 1 if single else own.tasks
        return result

    return watched

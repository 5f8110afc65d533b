"""Where the native executor's time goes: calls, seconds, operations and bytes of every operation's maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastmeta.engine import cost
from fastmeta.engine.lower.operands import Operands


@dataclass(frozen=True)
class Record:
    """One map of one native operation, summed over tasks, inner steps and meta-steps.

    Attributes:
        operation: its name, such as ``conv_block``.
        module: the submodule whose parameters it reads; empty where it has none.
        phase: ``support`` or ``query``.
        map: ``forward``, ``backward``, ``tangent`` or ``tangent_backward``.
        calls: one a task and inner step, or one a task where nothing that adapts comes before.
        seconds: of threads: where several work on one task, all of them count for as long as the call takes. Sums over
            readers of a value, and steps along a gradient, count with the map that they follow; the gradient of a
            weight that no task forms is summed up behind all maps and counts with none.
        flops: floating-point operations of the products, convolutions counted directly;
            :func:`fastmeta.engine.cost.flops_by_map`.
        bytes: of operands and results, each once a call; :func:`fastmeta.engine.cost.bytes_by_map`.
        threads: that worked on each call, in the last meta-step.
    """

    operation: str
    module: str
    phase: str
    map: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    threads: int


class Profile:
    """What was collected: see :func:`collect`."""

    def __init__(self) -> None:
        self._parts: dict[int, _Part] = {}

    @property
    def meta_steps(self) -> int:
        """How many the native executor ran."""
        return sum(part.native.meta_steps for part in self._parts.values())

    @property
    def seconds(self) -> float:
        """What they took from begin to end: time by the clock, whatever the number of threads."""
        return sum(part.native.seconds for part in self._parts.values())

    @property
    def records(self) -> list[Record]:
        """One a map that ran, in execution order of the operations, the support's first."""
        return [record for part in self._parts.values() for record in part.records()]

    def part(self, step: Any, support: Sequence[Operands], query: Sequence[Operands]) -> Any:
        """The native profile that a compiled meta-step adds to.

        Args:
            step: ``MetaGradient32`` or ``MetaGradient64`` of the extension, which must outlive the profile's use.
            support: operands of its operations on the support set.
            query: likewise.
        """
        part = self._parts.get(id(step))
        if part is None:
            part = self._parts[id(step)] = _Part(step, step.profile(), support, query)
        return part.native


@dataclass(frozen=True)
class _Part:
    step: Any  # kept, so that its id stays its own
    native: Any
    support: Sequence[Operands]
    query: Sequence[Operands]

    def records(self) -> Iterator[Record]:
        phases = (("support", self.native.support, self.support), ("query", self.native.query, self.query))
        for phase, table, operations in phases:
            for operands, tallies in zip(operations, table, strict=True):
                instruction = operands.instruction
                flops, size = cost.flops_by_map(instruction), cost.bytes_by_map(operands)
                for i, (calls, seconds) in enumerate(tallies):
                    if calls:
                        yield Record(
                            operands.operation,
                            "" if instruction is None else instruction.module,
                            phase,
                            cost.MAPS[i],
                            calls,
                            seconds,
                            calls * flops[i],
                            calls * size[i],
                            self.native.within,
                        )


_collecting: ContextVar[Profile | None] = ContextVar("fastmeta_profile", default=None)


@contextmanager
def collect() -> Iterator[Profile]:
    """Profile the meta-steps that this thread, or task of asyncio, has the native executor run inside the block.

    The clock is the processor's time-stamp counter on x86-64, read once a map, and ``steady_clock`` elsewhere; the
    length of a tick is that of the meta-steps' own beginnings and ends by ``steady_clock``. Outside such a block
    nothing is read.

    Yields:
        The profile; read it when no meta-step runs. An inner block collects instead of an outer one.
    """
    profile = Profile()
    token = _collecting.set(profile)
    try:
        yield profile
    finally:
        _collecting.reset(token)


def collecting() -> Profile | None:
    """The innermost profile of this thread, if there is one."""
    return _collecting.get()

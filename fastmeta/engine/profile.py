"""Where the time of meta-steps goes: calls, seconds, operations and bytes of every operation's maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from fastmeta.engine import cost
from fastmeta.engine.lower.operands import Operands
from fastmeta.engine.program import Instruction
from fastmeta.engine.runs import Kind, Runs
from fastmeta.engine.timed import ADJOINT, INNER_LOOP, QUERY
from fastmeta.engine.work import Work


@dataclass(frozen=True)
class Record:
    """One map of one operation, summed over tasks, inner steps and meta-steps.

    Attributes:
        operation: its name, such as ``conv_block``.
        module: the submodule whose parameters it reads; empty where it has none.
        phase: ``support`` or ``query``.
        map: ``forward``, ``backward``, ``tangent`` or ``tangent_backward``.
        calls: one a task and inner step, or one a task where nothing that adapts comes before; of the reference
            executor, one for all tasks of a chunk.
        seconds: of threads: where several work on one task, all of them count for as long as the call takes. Sums over
            readers of a value, and steps along a gradient, count with the map that they follow; the gradient of a
            weight that no task forms is summed up behind all maps and counts with none.
        flops: floating-point operations of the products, convolutions counted directly;
            :func:`fastmeta.engine.cost.flops_by_map`. Where rows of padding are left out, of the others.
        bytes: of operands and results, each once a call; :func:`fastmeta.engine.cost.bytes_by_map`; likewise.
        threads: that worked on each call, in the last meta-step.
        part: of the meta-step: ``inner loop``, ``query`` or ``adjoint``. Of the native executor the support's tangents
            are the adjoint, and a backward pass that runs once for all steps counts with the inner loop.
        instruction: what ran, or what it was lowered from; ``None`` where it only changes a layout.
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
    part: str = ""
    instruction: Instruction | None = None


class Profile:
    """What was collected: see :func:`collect`.

    Attributes:
        runs: whole meta-steps, where they are wanted.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], _Part] = {}
        self.runs: Runs | None = None

    def watch(self, runs: Runs) -> None:
        """Collect whole meta-steps, too."""
        self.runs = runs

    @property
    def meta_steps(self) -> int:
        """How many the native executor ran; a pass by itself, where weights adapt alone, is one."""
        return sum(part.native.meta_steps for part in self._parts.values())

    @property
    def seconds(self) -> float:
        """What they took from begin to end: time by the clock, whatever the number of threads."""
        return sum(part.native.seconds for part in self._parts.values())

    @property
    def records(self) -> list[Record]:
        """One a map that the native executor ran, in execution order of the operations, the support's first."""
        return [record for part in self._parts.values() for record in part.records()]

    def records_of(self, kind: Kind) -> list[Record]:
        """Those of one kind of meta-step, by the native executor or by the reference one."""
        native = [record for part in self._parts.values() if part.kind is kind for record in part.records()]
        return native or list(_by_reference(kind))

    def part(
        self,
        step: Any,
        support: Sequence[Operands],
        query: Sequence[Operands],
        phase: str = "query",
        rows: tuple[float, float] = (1.0, 1.0),
    ) -> Any:
        """The native profile that a compiled meta-step adds to.

        Args:
            step: ``MetaGradient32`` or ``MetaGradient64`` of the extension, which must outlive the profile's use.
            support: operands of its operations on the support set.
            query: likewise.
            phase: what passes over the query set are called; those of one step always the same.
            rows: of support and query, the part of padded sequences' rows that is gone through.
        """
        kind = None if self.runs is None else self.runs.current
        part = self._parts.get((id(step), id(kind)))
        if part is None:
            part = self._parts[id(step), id(kind)] = _Part(step, step.profile(), support, query, kind, phase)
        part.rows.append(rows)
        return part.native


@dataclass(frozen=True)
class _Part:
    step: Any  # kept, so that its id stays its own
    native: Any
    support: Sequence[Operands]
    query: Sequence[Operands]
    kind: Kind | None
    phase: str
    rows: list[tuple[float, float]] = field(default_factory=list)  # one a meta-step

    def records(self) -> Iterator[Record]:
        of_support, of_query = (sum(share) / len(self.rows) for share in zip(*self.rows, strict=True))
        phases = (
            ("support", self.native.support, self.support, of_support),
            (self.phase, self.native.query, self.query, of_query),
        )
        for phase, table, operations, kept in phases:
            for operands, tallies in zip(operations, table, strict=True):
                instruction, share = operands.instruction, kept if operands.kept_rows else 1.0
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
                            round(calls * flops[i] * share),
                            round(calls * size[i] * share),
                            self.native.within,
                            QUERY if phase == "query" else INNER_LOOP if i < 2 else ADJOINT,
                            instruction,
                        )


def _by_reference(kind: Kind) -> Iterator[Record]:
    for timed in kind.timed.values():
        operands = cost.operands_by_call(timed.program)
        for i, instruction, number, tally in timed.counted():
            yield Record(
                instruction.op.name,
                instruction.module,
                "query" if timed.part == QUERY else "support",
                cost.MAPS[number],
                tally.calls,
                tally.seconds,
                tally.tasks * cost.flops_by_map(instruction)[number],
                tally.tasks * cost.bytes_by_map(operands[i])[number],
                kind.threads,
                timed.part,
                instruction,
            )


_collecting: ContextVar[Profile | None] = ContextVar("fastmeta_profile", default=None)
_everywhere: list[Profile] = []  # at most one


@contextmanager
def collect(profile: Profile | None = None) -> Iterator[Profile]:
    """Profile the operations that this thread, or task of asyncio, has the native executor run inside the block.

    With :meth:`Profile.watch`, whole meta-steps and the reference executor's operations too.

    The clock is the processor's time-stamp counter on x86-64, read once a map, and ``steady_clock`` elsewhere; the
    length of a tick is that of the meta-steps' own beginnings and ends by ``steady_clock``. Outside such a block
    nothing is read.

    Args:
        profile: to add to; a new one if left out.

    Yields:
        The profile; read it when no meta-step runs. An inner block collects instead of an outer one.
    """
    profile = Profile() if profile is None else profile
    token = _collecting.set(profile)
    try:
        yield profile
    finally:
        _collecting.reset(token)


def collect_everywhere(profile: Profile) -> None:
    """Collect in ``profile`` from now on and on every thread, where no block of :func:`collect` does."""
    _everywhere[:] = [profile]


def collecting() -> Profile | None:
    """The innermost profile of this thread, if there is one."""
    profile = _collecting.get()
    return profile if profile is not None or not _everywhere else _everywhere[0]


def watching() -> Runs | None:
    """The innermost profile's whole meta-steps, where they are wanted."""
    profile = collecting()
    return None if profile is None else profile.runs


@contextmanager
def span(name: str) -> Iterator[None]:
    """Measure a part of the program, where a profile wants it."""
    runs = watching()
    with nullcontext() if runs is None else runs.span(name):
        yield


@contextmanager
def by_autodiff(work: Work, why: str) -> Iterator[None]:
    """Measure a meta-step that is one piece."""
    runs = watching()
    if runs is None:
        yield
        return
    with runs.meta_step(work, None, gradient=torch.is_grad_enabled()) as running:
        running.by("autodiff", why)
        yield

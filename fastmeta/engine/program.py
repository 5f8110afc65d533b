"""The planned program: what every executor runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from fastmeta.core.task_op import Need, TaskOp
from fastmeta.engine.segments import starts
from fastmeta.engine.trace import Graph


@dataclass(frozen=True)
class Route:
    """How one instruction meets the task axis in one phase of the unroll.

    Attributes:
        single: no input differs between tasks, so it runs once, as if there were one task.
        expand: positions of shared inputs that are expanded to T.
        need: what is wanted of each input's cotangent.
        inner: the same where the gradient by what adapts alone is wanted, as in an inner step.
        sums: positions whose cotangents are summed over tasks after the map, because the input is shared by all
            tasks and the operation does not sum by itself.
    """

    single: bool
    expand: tuple[int, ...]
    need: tuple[Need, ...]
    inner: tuple[Need, ...]
    sums: tuple[int, ...]

    @property
    def active(self) -> bool:
        """Whether any cotangent is wanted."""
        return any(self.need)

    def wanted(self, outer: bool) -> tuple[Need, ...]:
        """``need``, or ``inner`` where gradients of the parameters that do not adapt are not wanted."""
        return self.need if outer else self.inner


@dataclass(frozen=True)
class Instruction:
    """One operation with the slots it reads and fills."""

    op: TaskOp
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    module: str
    reason: str  # why the generic op stands in, or why it is not fused with a neighbour; else empty
    first: Route  # while every task still holds the shared weights
    later: Route  # once each task has its own
    invariant: bool  # depends on nothing that adapts and not on chance: the same at every inner step

    def route(self, first: bool) -> Route:
        """The route of this phase."""
        return self.first if first else self.later


@dataclass(frozen=True)
class Program:
    """A graph with an operation for every call and everything decided that does not depend on values.

    Attributes:
        graph: the traced objective.
        instructions: in execution order.
        constants: slots whose value never changes, evaluated once when the program was planned.
        adapted: names of the parameters the inner loop updates, in packing order.
        outer: names of the other parameters that get a meta-gradient.
        tasked_first: slots that carry the task axis while tasks still share their weights.
        tasked_later: slots that carry it afterwards.
        factored: the adapting parameters whose weights are the shared one and factors.
        bounded: those of them that each task forms from the step on where that takes fewer operations.
        met: those of them that meet the rows of the data alone.
    """

    graph: Graph
    instructions: tuple[Instruction, ...]
    constants: dict[int, Tensor]
    adapted: tuple[str, ...]
    outer: tuple[str, ...]
    tasked_first: frozenset[int]
    tasked_later: frozenset[int]
    factored: frozenset[str] = frozenset()
    bounded: frozenset[str] = frozenset()
    met: frozenset[str] = frozenset()

    def tasked(self, first: bool) -> frozenset[int]:
        """Slots that carry the task axis in this phase."""
        return self.tasked_first if first else self.tasked_later

    @cached_property
    def unused(self) -> list[str]:
        """Adapting parameters the loss does not depend on."""
        reached = {self.graph.loss}
        for instruction in reversed(self.instructions):
            if reached.intersection(instruction.outputs):
                reached.update(
                    slot for slot, need in zip(instruction.inputs, instruction.later.need, strict=True) if need
                )
        return [name for name in self.adapted if self.graph.parameters[name] not in reached]

    @cached_property
    def last_read(self) -> list[list[int]]:
        """For each instruction the slots that it reads or fills and no later one reads."""
        seen: set[int] = set()
        found = []
        for instruction in reversed(self.instructions):
            slots = dict.fromkeys((*instruction.inputs, *instruction.outputs))
            found.append([slot for slot in slots if slot not in seen])
            seen.update(slots)
        return found[::-1]

    @cached_property
    def segments(self) -> tuple[int, ...]:
        """Positions to run instructions again from, so that a pass keeps little."""
        made = [sum(self._bytes(slot) for slot in instruction.outputs) for instruction in self.instructions]
        live, now = [], 0
        filled: set[int] = set()
        for instruction, bytes_made, last in zip(self.instructions, made, self.last_read, strict=True):
            live.append(now)
            filled.update(instruction.outputs)
            now += bytes_made - sum(self._bytes(slot) for slot in last if slot in filled)
        return starts(made, live)

    def _bytes(self, slot: int) -> int:
        value = self.graph.values[slot]
        return prod(value.shape) * value.dtype.itemsize

    @cached_property
    def boundary(self) -> frozenset[int]:
        """Slots that loop-invariant instructions fill, and that others read."""
        filled = {slot for instruction in self.instructions if instruction.invariant for slot in instruction.outputs}
        read = {slot for instruction in self.instructions if not instruction.invariant for slot in instruction.inputs}
        return frozenset(filled & (read | {self.graph.loss, *self.graph.outputs, *self.graph.mutations.values()}))

    @cached_property
    def batch_statistics(self) -> bool:
        """Whether any normalisation mixes the samples of a set."""
        return any(getattr(instruction.op, "uses_batch_statistics", False) for instruction in self.instructions)

"""Instructions without a kernel: calls back to their own maps, which cut the native program, or a prelude to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmeta.engine.callback import JOINS, Callback, Failures, Operand, Place
from fastmeta.engine.composite import Composite
from fastmeta.engine.lower.attention import lower_attention
from fastmeta.engine.lower.lowering import ABSENT, Data, Lowering, NotLowered, Value, is_rename
from fastmeta.engine.program import Instruction

MAX_INPUTS, MAX_WEIGHTS = 4, 6  # csrc/executor/operation.h
# Small operations go with one before them that has no kernel: every call back costs more than they do.
SMALL = frozenset(
    {"sum", "product", "quotient", "activation", "reduction", "view", "softmax", "matmul", "attention", "dropout"}
)


class Cutter:
    """Takes what has no kernel, and emits it when something else reads it, in pieces with one result each.

    Args:
        failures: where callbacks leave their exceptions.

    Attributes:
        cuts: what is called back, and why.
        prelude: what reads the task's data and buffers alone, and why it is not native.
        prelude_slots: of the results of that, which are data to the program.
    """

    def __init__(self, failures: Failures) -> None:
        self.cuts: list[tuple[Instruction, str]] = []
        self.prelude: list[tuple[Instruction, str]] = []
        self.prelude_slots: list[int] = []
        self._failures = failures
        self._waiting: dict[int, Instruction] = {}  # by the slots they fill, in execution order

    def joins(self, lowering: Lowering, instruction: Instruction) -> bool:
        """Take a small instruction, or a change of shape, that reads what waits here."""
        if not self._waiting.keys() & set(instruction.inputs):
            return False
        small = instruction.op.name in SMALL or is_rename(instruction)
        if instruction.op.random or not small or len(instruction.outputs) > 1:
            return False
        self._wait(lowering, instruction, JOINS)
        return True

    def take(self, lowering: Lowering, instruction: Instruction, reason: str) -> None:
        """Take an instruction that no handler can lower.

        Raises:
            NotLowered: it draws random numbers, in an order that native tasks do not keep.
        """
        if instruction.op.random:
            raise NotLowered(f"{instruction.op.call.target} draws random numbers")
        graph = lowering.graph
        same = {slot for name, slot in graph.buffers.items() if name not in graph.mutations}
        same |= lowering.program.constants.keys()
        if all(slot in same or isinstance(lowering.held.get(slot), Data) for slot in instruction.inputs):
            self.prelude.append((instruction, reason))
            for slot in instruction.outputs:
                lowering.held[slot] = Data(len(lowering.data))
                lowering.data.append(slot)
                self.prelude_slots.append(slot)
            return
        self._wait(lowering, instruction, reason)

    def provide(self, lowering: Lowering, slots: Sequence[int]) -> None:
        """Emit what computes ``slots``; results in between that others read come first."""
        for slot in slots:
            while slot in self._waiting:
                piece: int | None = slot
                while piece is not None:
                    result, piece = piece, self._first_read_outside(lowering, piece)
                self._emit(lowering, result)

    def _wait(self, lowering: Lowering, instruction: Instruction, reason: str) -> None:
        read = {*lowering.readers, lowering.graph.loss, *lowering.graph.outputs}
        if len(read.intersection(instruction.outputs)) > 1:
            raise NotLowered(f"{instruction.op.call.target} has several results that are read")
        self.cuts.append((instruction, reason))
        self._waiting.update(dict.fromkeys(instruction.outputs, instruction))

    def _emit(self, lowering: Lowering, slot: int) -> None:
        """Emit the part of what waits that ``slot`` depends on, or a piece of it that has to be an operation."""
        part = self._part(slot)
        every = [made for instruction in part for made in instruction.outputs]
        closed = [made for made in every if self._first_read_outside(lowering, made) is None]
        for made in closed:
            piece = self._part(made)
            if lower_attention(lowering, piece, made):
                inside = {id(instruction) for instruction in piece}
                self.cuts = [cut for cut in self.cuts if id(cut[0]) not in inside]
                self._forget(piece)
                return
        if not _fits(lowering, part):  # the largest piece that does comes first
            sizes = [(len(self._part(made)), made) for made in closed if _fits(lowering, self._part(made))]
            if sizes:
                slot = max(sizes)[1]
                part = self._part(slot)
        emit_composite(lowering, Composite(part, _inputs(part), slot), self._failures)
        self._forget(part)

    def _first_read_outside(self, lowering: Lowering, slot: int) -> int | None:
        """Of what ``slot`` is computed from here, the first result that something else reads, too."""
        part = self._part(slot)
        every = [made for instruction in part for made in instruction.outputs if made != slot]
        return next((made for made in every if self._is_read_outside(lowering, part, made)), None)

    @staticmethod
    def _is_read_outside(lowering: Lowering, part: Sequence[Instruction], slot: int) -> bool:
        inside = {id(instruction) for instruction in part}
        if slot == lowering.graph.loss or slot in lowering.graph.outputs:
            return True
        return any(id(reader) not in inside for reader in lowering.readers.get(slot, []))

    def _forget(self, part: Sequence[Instruction]) -> None:
        for made in [made for instruction in part for made in instruction.outputs]:
            del self._waiting[made]

    def _part(self, slot: int) -> list[Instruction]:
        """What waits and ``slot`` depends on, in execution order."""
        wanted = {slot}
        part = []
        for instruction in reversed(list({id(i): i for i in self._waiting.values()}.values())):
            if wanted & set(instruction.outputs):
                wanted.update(instruction.inputs)
                part.append(instruction)
        return part[::-1]


def _inputs(part: Sequence[Instruction]) -> tuple[int, ...]:
    """Slots that come from elsewhere."""
    made = {slot for instruction in part for slot in instruction.outputs}
    return tuple(dict.fromkeys(s for instruction in part for s in instruction.inputs if s not in made))


def _fits(lowering: Lowering, part: Sequence[Instruction]) -> bool:
    """Whether one operation can read all that these do."""
    read = [slot for slot in _inputs(part) if slot not in lowering.program.constants]
    values = sum(slot in lowering.held for slot in read)
    return values <= MAX_INPUTS and len(read) - values <= MAX_WEIGHTS


def emit_composite(lowering: Lowering, composite: Composite, failures: Failures) -> None:
    """Emit an operation that runs a composition's own maps.

    Raises:
        NotLowered: it reads nothing but parameters, or more than an operation can, or has a result that no value of
            the executor can hold.
    """
    last, slot = composite.instructions[-1], composite.output
    values, name = lowering.graph.values, composite.instructions[-1].op.call.target
    if values[slot].dtype != lowering.dtype:
        raise NotLowered(f"{name} gives {values[slot].dtype}")
    sources: list[tuple[bool, int]] = []
    x_rows, x_features, x_bytes = ([0] * MAX_INPUTS for _ in range(3))
    weights: list[int] = []
    sizes: list[int] = []
    places: list[Place | Tensor] = []
    for read in composite.inputs:
        shape, dtype = values[read].shape, values[read].dtype
        held = lowering.held.get(read)
        if held is not None and len(sources) == MAX_INPUTS:
            raise NotLowered(f"{name} reads more than {MAX_INPUTS} values")
        if isinstance(held, Value):
            at = len(sources)
            places.append(Place(Operand(shape, dtype, held.shape), False, at))
            x_rows[at], x_features[at] = held.samples * held.pixels, held.channels
            sources.append((False, held.index))
        elif isinstance(held, Data):
            places.append(Place(Operand(shape, dtype), False, len(sources)))
            x_bytes[len(sources)] = math.prod(shape) * dtype.itemsize
            sources.append((True, held.index))
        elif read in lowering.program.constants:
            places.append(lowering.program.constants[read].unsqueeze(0))
        elif dtype != lowering.dtype or len(weights) == MAX_WEIGHTS:
            raise NotLowered(f"{name} reads a parameter or buffer of {dtype}, or more than {MAX_WEIGHTS}")
        else:
            places.append(Place(Operand(shape, dtype), True, len(weights)))
            number = lowering.parameter if lowering.is_parameter(read) else lowering.buffer
            weights.append(number(read))
            sizes.append(math.prod(shape))
    if not sources:
        raise NotLowered(f"{name} reads no value: what it gives would be a weight")
    value = _value(values[slot].shape)
    callback = Callback(composite, places, Operand(values[slot].shape, values[slot].dtype, value.shape), failures)
    described: dict[str, Any] = {"rows": value.samples * value.pixels, "features": value.channels, "call": callback}
    described |= {"x_rows": x_rows, "x_features": x_features, "x_bytes": x_bytes}
    described["weights"] = sizes + [0] * (MAX_WEIGHTS - len(sizes))
    index = lowering.emit("callback", described, sources, weights, of=last)
    lowering.held[slot] = Value(index, *value.shape)


def _value(shape: tuple[int, ...]) -> Value:
    """What holds a result of ``shape``: images, or rows of its last axis."""
    if 0 in shape:
        raise NotLowered(f"a result of shape {shape}")
    if len(shape) == 4:
        samples, channels, height, width = shape
        return Value(ABSENT, samples, channels, height, width)
    return Value(ABSENT, math.prod(shape[:-1]), math.prod(shape[-1:]))

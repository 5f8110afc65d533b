"""The walk over a program's instructions: which slot is held where, who reads it, what has been taken along."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastmeta.core.task_op import Output
from fastmeta.engine.kept_rows import KeptRows
from fastmeta.engine.lower.operands import ABSENT, Operands, Sizes, operands
from fastmeta.engine.program import Instruction, Program

# Calls that leave a contiguous tensor's elements in place.
RENAMES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.default"),
        *("squeeze.dim", "squeeze.dims", "flatten.using_ints", "unflatten.int", "alias.default", "clone.default"),
    )
)
# What these compute of the tasks' data alone runs before.
ELEMENTWISE = frozenset({"sum", "product", "quotient", "activation"})
ONCE = "each inner step would compute it again"


class NotLowered(Exception):
    """A program the native executor cannot run; the message is the reason ``explain()`` shows."""


Handler = Callable[["Lowering", Instruction], None]


class Rest(Protocol):
    """What is done with instructions that have no kernel, lower/callbacks.py."""

    cuts: list[tuple[Instruction, str]]
    prelude: list[tuple[Instruction, str]]
    prelude_slots: list[int]

    def joins(self, lowering: Lowering, instruction: Instruction) -> bool:
        """Whether the instruction has been taken, because it goes with some of those."""

    def take(self, lowering: Lowering, instruction: Instruction, reason: str) -> None:
        """Take an instruction that no handler can lower."""

    def provide(self, lowering: Lowering, slots: Sequence[int]) -> None:
        """Emit what has been taken and computes ``slots``."""


@dataclass(frozen=True)
class Lowered:
    """What the native executor is given.

    Attributes:
        program: its operations and counts, as csrc/executor/bind.cpp reads them.
        parameters: names in the program's order: adapted, otherwise differentiated, others.
        buffers: names of the buffers that are read, whose numbers follow.
        output: rows and features of the query output that can be had, if there is exactly one.
        operands: one an operation.
        cuts: the instructions without kernels, whose own maps are called back, and why.
        prelude: the instructions that read the task's data alone and run before, and why.
        prelude_slots: of the results of those, which are further data.
        rows: which rows the operations go through whose list is the last of the data; ``None`` where there is none.
        kept: the same with such a list, where there can be one.
    """

    program: dict[str, Any]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    output: tuple[int, int] | None
    operands: tuple[Operands, ...]
    cuts: tuple[tuple[Instruction, str], ...]
    prelude: tuple[tuple[Instruction, str], ...]
    prelude_slots: tuple[int, ...]
    rows: KeptRows | None = None
    kept: Lowered | None = None


@dataclass(frozen=True)
class Data:
    """A tensor of the task's batch: its index among the leaves."""

    index: int


@dataclass(frozen=True)
class Value:
    """A value of the native executor, whatever shape the graph sees it in.

    Images with their channels last; rows of features are images of one pixel.
    """

    index: int
    samples: int
    channels: int
    height: int = 1
    width: int = 1

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.height * self.width

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As PyTorch has images."""
        return self.samples, self.channels, self.height, self.width


def _no_kernel(lowering: Lowering, instruction: Instruction) -> None:
    raise NotLowered(f"{instruction.op.name} ({instruction.op.call.target}) has no native kernel of its own")


class Lowering:
    """One program on its way.

    Attributes:
        dtype: of all parameters.
        data: slots of the task's data, and of what is computed from them alone before.
        held: the value or data behind each slot that is computed so far.
    """

    def __init__(self, program: Program, outer: tuple[str, ...]) -> None:
        self.program, self.graph, self.outer = program, program.graph, outer
        self.needed = self._needed()
        self.readers: dict[int, list[Instruction]] = defaultdict(list)
        for instruction in self.needed:
            for slot in instruction.inputs:
                self.readers[slot].append(instruction)
        self.names = self._names()
        dtypes = {self.graph.values[self.graph.parameters[name]].dtype for name in self.names}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            raise NotLowered(f"parameters must all be float32 or all float64, got {sorted(map(str, dtypes))}")
        self.dtype = dtypes.pop()
        self.data = list(self.graph.data)
        self.held: dict[int, Data | Value] = {slot: Data(i) for i, slot in enumerate(self.data)}
        self._parameters = {slot: name for name, slot in self.graph.parameters.items()}
        self._read: set[str] = set()  # parameters and buffers that have their one reader
        self._buffers: list[str] = []
        self._taken: set[int] = set()  # results of instructions that another one took along
        self._made: dict[tuple[Any, ...], Value] = {}  # other layouts of values and data, by what they are of
        self._operations: list[dict[str, Any]] = []
        self._instructions: list[Instruction | None] = []  # one an operation
        self._at: Instruction | None = None  # whose handler is at work

    def run(self, handlers: Mapping[str, Handler], rest: Rest) -> Lowered:
        """Lower all instructions, each by the handler of its operation's name, or leave it to the ``rest``."""
        for instruction in self.needed:  # views of parameters stand anywhere before what reads them
            if is_rename(instruction) and instruction.inputs[0] in self._parameters:
                self._parameters[instruction.outputs[0]] = self._parameters[instruction.inputs[0]]
                self._taken.add(instruction.outputs[0])
        for instruction in self.needed:
            if instruction.outputs[0] in self._taken or rest.joins(self, instruction):
                continue
            rest.provide(self, instruction.inputs)
            if self._renames(instruction):
                continue
            from_data = all(isinstance(self.held.get(slot), Data) for slot in instruction.inputs)
            if from_data and instruction.op.name in ELEMENTWISE:
                rest.take(self, instruction, ONCE)
                continue
            self._at = instruction
            before = self._state()
            try:
                handlers.get(instruction.op.name, _no_kernel)(self, instruction)
            except NotLowered as reason:
                self._return_to(before)
                rest.take(self, instruction, str(reason))
        rest.provide(self, [*self.graph.outputs, self.graph.loss])
        return self._result(rest)

    def _state(self) -> tuple[Any, ...]:
        """What a handler changes."""
        changing = self.held, self._read, self._buffers, self._taken, self._made, self._operations, self._instructions
        return tuple(part.copy() for part in changing)

    def _return_to(self, state: tuple[Any, ...]) -> None:
        self.held, self._read, self._buffers, self._taken, self._made, self._operations, self._instructions = state

    def follower(self, slot: int) -> Instruction | None:
        """The instruction that alone reads ``slot``, by whatever shape."""
        readers = self.readers[slot]
        if len(readers) != 1 or slot in self.graph.outputs:
            return None
        return self.follower(readers[0].outputs[0]) if is_rename(readers[0]) else readers[0]

    def take(self, slot: int, follower: Instruction) -> int:
        """Take ``slot``'s :meth:`follower` along with what computed the slot; return the follower's own."""
        while True:
            instruction = self.readers[slot][0]
            slot = instruction.outputs[0]
            self._taken.add(slot)
            if instruction is follower:
                return slot

    def parameter(self, slot: int) -> int:
        """The number of the parameter behind ``slot``, whose one reader this is."""
        name = self._parameters.get(slot)
        if name is None:
            raise NotLowered("a weight that is computed, or a buffer")
        return self.names.index(self._read_once("parameter", name))

    def buffer(self, slot: int) -> int:
        """The number of the buffer behind ``slot``, a constant whose one reader this is."""
        name = next((name for name, place in self.graph.buffers.items() if place == slot), None)
        if name is None:
            raise NotLowered("running statistics that are computed")
        self._buffers.append(self._read_once("buffer", name))
        return len(self.names) + len(self._buffers) - 1

    def _read_once(self, kind: str, name: str) -> str:
        if name in self._read:
            raise NotLowered(f"{kind} {name} has several readers")
        self._read.add(name)
        return name

    def is_parameter(self, slot: int) -> bool:
        """Whether ``slot`` is a parameter or a view of one."""
        return slot in self._parameters

    def value(self, slot: int, like: Value | None = None) -> Value:
        """What ``slot`` holds; a task's data are brought into the layout of ``like``, or what their shape suggests."""
        held = self._held(slot)
        if isinstance(held, Value):
            return held
        shape = self.graph.values[slot].shape
        if len(shape) != 4:  # views of a norm's groups say nothing about the layout
            shape = self.graph.values[self.data[held.index]].shape
        if like is not None:
            samples, channels, *size = like.shape
        elif len(shape) == 4:
            samples, channels, *size = shape
        else:
            samples, channels, size = math.prod(shape[:-1]), math.prod(shape[-1:]), [1, 1]
        key = (held, samples, channels, *size)
        if key not in self._made:
            described = {"n": samples, "channels": channels, "pixels": math.prod(size)}
            index = self._append("data", described, [(True, held.index)], None)
            self._made[key] = Value(index, samples, channels, *size)
        return self._made[key]

    def rows(self, value: Value) -> Value:
        """``value`` with one pixel: channels and pixels of an image become its features, as PyTorch flattens them."""
        if value.pixels == 1:
            return value
        if (value,) not in self._made:
            described = {"n": value.samples, "channels": value.channels, "pixels": value.pixels}
            index = self._append("flatten", described, [(False, value.index)], None)
            self._made[(value,)] = Value(index, value.samples, value.channels * value.pixels)
        return self._made[(value,)]

    def source(self, slot: int, shape: tuple[int, ...]) -> tuple[bool, int]:
        """What an operation reads that takes data as they are, as ``(whether data, index)``.

        Args:
            slot: read.
            shape: wanted: ``(rows, features)`` or that of images.
        """
        held = self._held(slot)
        if isinstance(held, Data):
            return True, held.index
        if len(shape) == 2:
            held = self.rows(held)
        if held.shape != (*shape, 1, 1)[:4]:
            raise NotLowered(f"a value of shape {held.shape} read as {shape}")
        return False, held.index

    def emit(
        self,
        operation: str,
        shape: dict[str, Any],
        x: list[tuple[bool, int]],
        w: list[int] | None = None,
        target: int = ABSENT,
        of: Instruction | None = None,
    ) -> int:
        """Append the native operation of an instruction, the one at hand; return the number of its value."""
        return self._append(operation, shape, x, of or self._at, w or [], target)

    def _append(
        self,
        operation: str,
        shape: dict[str, Any],
        x: list[tuple[bool, int]],
        instruction: Instruction | None,
        w: Sequence[int] = (),
        target: int = ABSENT,
    ) -> int:
        y = len(self._operations)
        self._operations.append({"operation": operation, **shape, "x": x, "w": list(w), "target": target, "y": y})
        self._instructions.append(instruction)
        return y

    def _held(self, slot: int) -> Data | Value:
        held = self.held.get(slot)
        if held is None:
            raise NotLowered("a parameter or buffer read as a value")
        if isinstance(held, Data) and self.graph.values[slot].dtype != self.dtype:
            raise NotLowered(f"an input of {self.graph.values[slot].dtype}")
        return held

    def _needed(self) -> list[Instruction]:
        """The instructions that loss and outputs depend on: those that only count a buffer up are left out."""
        needed = {self.graph.loss, *self.graph.outputs}
        kept = []
        for instruction in reversed(self.program.instructions):
            if needed.intersection(instruction.outputs):
                needed.update(instruction.inputs)
                kept.append(instruction)
        return kept[::-1]

    def _names(self) -> tuple[str, ...]:
        wanted = (*self.program.adapted, *self.outer)
        others = [n for n, slot in self.graph.parameters.items() if slot in self.readers and n not in wanted]
        unread = [n for n in wanted if self.graph.parameters[n] not in self.readers]
        if unread:
            raise NotLowered(f"parameter {unread[0]} is not used")
        return (*wanted, *others)

    def _renames(self, instruction: Instruction) -> bool:
        call = instruction.op.call
        same = all(i.shape == o.shape and i.dtype == o.dtype for i, o in zip(call.inputs, call.outputs, strict=False))
        if str(call.target) == "aten.broadcast_tensors.default" and same:
            pairs = list(zip(instruction.inputs, instruction.outputs, strict=True))
        elif is_rename(instruction):
            pairs = [(instruction.inputs[0], instruction.outputs[0])]
        else:
            return False
        for old, new in pairs:
            if old not in self.held:
                raise NotLowered(f"{call.target} of a parameter or buffer")
            self.held[new] = self.held[old]
        return True

    def _result(self, rest: Rest) -> Lowered:
        outputs = [self.held.get(slot) for slot in self.graph.outputs]
        output = outputs[0] if len(outputs) == 1 else None
        if isinstance(output, Value) and output.pixels > 1:
            output = self._made.get((output,))  # as the loss reads it
        if isinstance(output, Data):
            output = None
        program = {
            "operations": self._operations,
            "values": len(self._operations),
            "output": ABSENT if output is None else output.index,
            "adapted": len(self.program.adapted),
            "differentiated": len(self.program.adapted) + len(self.outer),
            "parameters": len(self.names) + len(self._buffers),
        }
        shape = None if output is None else (output.samples, output.channels)
        loss = self.held.get(self.graph.loss)
        if isinstance(loss, Value) and loss.index != len(self._operations) - 1:
            raise NotLowered("the loss is not what is computed last")
        cuts, prelude, slots = tuple(rest.cuts), tuple(rest.prelude), tuple(rest.prelude_slots)
        return Lowered(program, self.names, tuple(self._buffers), shape, self._operands(), cuts, prelude, slots)

    def _operands(self) -> tuple[Operands, ...]:
        size = self.dtype.itemsize
        sizes = Sizes(
            [size] * len(self._operations),  # the loss, which no slot holds
            [_bytes(self.graph.values[slot]) for slot in self.data],
            [_bytes(self.graph.values[self.graph.parameters[name]]) for name in self.names]
            + [_bytes(self.graph.values[self.graph.buffers[name]]) for name in self._buffers],
        )
        for value in (*self.held.values(), *self._made.values()):
            if isinstance(value, Value):
                sizes.values[value.index] = math.prod(value.shape) * size
        adapted = len(self.program.adapted)
        return operands(self._operations, self._instructions, sizes, adapted, adapted + len(self.outer))


def _bytes(value: Output) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def is_rename(instruction: Instruction) -> bool:
    """Whether the result has the elements of the one input in their order, in another shape."""
    call = instruction.op.call
    return str(call.target) in RENAMES and call.inputs[0].dtype == call.outputs[0].dtype

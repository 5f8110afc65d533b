"""Instructions without native kernels inside a native program: their own maps, on the native executor's memory.

The executor calls back once a map, task and inner step (csrc/callback/kernels.h). Everything around the call stays
native; what the planner compares is :func:`fastmeta.engine.cut.pays`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.engine.composite import Composite
from fastmeta.engine.program import Instruction, Program

JOINS = "it goes with what comes before"  # why a small instruction is called back for
FORWARD, _, TANGENT, _ = range(4)  # backward and its tangent have a cotangent, and two
Views = tuple[memoryview | None, ...]

# Two threads never call back at once: what torch.func and the attention kernels switch on and off holds for a process.
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Operand:
    """How one task's tensor lies in memory.

    Attributes:
        shape: as the operation sees it.
        dtype: of its elements.
        images: ``(n, channels, height, width)`` where it lies as the executor's values do, channels last in rows that
            are padded to whole vectors; ``None`` where it is contiguous, whatever is behind it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    images: tuple[int, int, int, int] | None = None

    def read(self, view: memoryview) -> Tensor:
        """The tensor, ``[1, *shape]``; it shares memory with ``view`` where its layout can be expressed by strides."""
        flat = torch.frombuffer(view, dtype=self.dtype)
        return self._placed(flat).reshape(1, *self.shape)

    def write(self, view: memoryview, value: Tensor | None) -> None:
        """Fill the memory with ``value``, ``[1, *shape]``, or with zeros; padding becomes zero."""
        flat = torch.frombuffer(view, dtype=self.dtype)
        if value is None or flat.numel() != math.prod(self.shape):
            flat.zero_()
        if value is None:
            return
        placed = self._placed(flat)
        placed.copy_(value.reshape(placed.shape))

    def _placed(self, flat: Tensor) -> Tensor:
        if self.images is None:
            return flat[: math.prod(self.shape)]
        n, _, height, width = self.images
        row = flat.numel() // (n * height * width)
        return flat.as_strided(self.images, (height * width * row, 1, width * row, row))


@dataclass(frozen=True)
class Place:
    """Where an input of the operation lies: among the executor's inputs, or its weights."""

    operand: Operand
    weight: bool
    index: int

    def of(self, x: Views, w: Views) -> memoryview | None:
        """Its memory; ``None`` where there is nothing, or where nothing is wanted."""
        return (w if self.weight else x)[self.index]


@dataclass
class Failures:
    """The first exception that was raised inside a meta-step; whatever would follow is left out."""

    first: BaseException | None = None


@dataclass
class Callback:
    """The four maps of a composition, called with the memory of one task.

    Attributes:
        op: the composition.
        places: of its inputs; a constant itself, ``[1, ...]``, where one never changes.
        y: how its result lies.
        failures: where exceptions go: they must not pass through the executor's threads.
    """

    op: Composite
    places: Sequence[Place | Tensor]
    y: Operand
    failures: Failures
    _saved: dict[int, Any] = field(default_factory=dict)  # by the executor's name of a call
    _saved_dot: dict[int, Any] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop what maps keep for each other, once the meta-step is over."""
        self._saved.clear()
        self._saved_dot.clear()

    def __call__(self, which: int, key: int, y: memoryview, y_dot: memoryview | None, x: Views, w: Views) -> None:
        """Run map ``which``; csrc/callback/kernels.h says what the memory holds."""
        with _one_at_a_time:
            if self.failures.first is not None:
                return
            try:
                with torch.no_grad():
                    self._run(which, key, y, y_dot, x, w)
            except BaseException as failure:  # raised again where the meta-step was called
                self.failures.first = failure

    def _run(self, which: int, key: int, y: memoryview, y_dot: memoryview | None, x: Views, w: Views) -> None:
        if which == FORWARD:
            values = zip(self.places, self._tensors(x, w), strict=True)
            inputs = [place if isinstance(place, Tensor) else value for place, value in values]
            result, self._saved[key] = self.op.forward([value for value in inputs if value is not None])
            self.y.write(y, result)
        elif which == TANGENT:
            dot, self._saved_dot[key] = self.op.tangent(self._saved[key], tuple(self._tensors(x, w)))
            self.y.write(y, dot)
        else:
            self._back(key, self.y.read(y), None if y_dot is None else self.y.read(y_dot), x, w)

    def _back(self, key: int, d: Tensor, d_dot: Tensor | None, x: Views, w: Views) -> None:
        views = [None if isinstance(place, Tensor) else place.of(x, w) for place in self.places]
        need = tuple(view is not None for view in views)
        saved, saved_dot = self._saved[key], self._saved_dot.get(key)
        if d_dot is None:
            d_x = self.op.backward(saved, d, need)
        elif saved_dot is None:  # nothing varies: the map is linear in the cotangent
            d_x = self.op.backward(saved, d_dot, need)
        else:
            d_x = self.op.tangent_backward(saved, saved_dot, d, d_dot, need)
        for place, view, d_place in zip(self.places, views, d_x, strict=True):
            if view is not None and isinstance(place, Place):
                place.operand.write(view, d_place)

    def _tensors(self, x: Views, w: Views) -> list[Tensor | None]:
        """Of the inputs that are not constants, whatever derivative of theirs the memory holds."""
        read: list[Tensor | None] = []
        for place in self.places:
            view = None if isinstance(place, Tensor) else place.of(x, w)
            read.append(None if view is None or isinstance(place, Tensor) else place.operand.read(view))
        return read


class Prelude:
    """What reads the tasks' data and buffers alone, for all tasks before they are at work.

    Args:
        program: it belongs to.
        slots: whose values are further data.
    """

    def __init__(self, program: Program, slots: Sequence[int]) -> None:
        self.program, self.slots = program, slots
        wanted, instructions = set(slots), []
        for instruction in reversed(program.instructions):  # changes of shape between them are no operations elsewhere
            if wanted & set(instruction.outputs):
                wanted.update(instruction.inputs)
                instructions.append(instruction)
        self._instructions: list[Instruction] = instructions[::-1]

    def run(self, data: Sequence[Tensor], buffers: Mapping[str, Tensor]) -> list[Tensor]:
        """The data, ``[T, ...]``, and behind them what is computed."""
        graph, tasks = self.program.graph, data[0].shape[0]
        same = self.program.constants | {slot: buffers[name] for name, slot in graph.buffers.items()}
        values: dict[int, Any] = {slot: value.expand(tasks, *value.shape) for slot, value in same.items()}
        values.update(zip(graph.data, data, strict=True))
        for instruction in self._instructions:
            y, _ = instruction.op.forward([values[slot] for slot in instruction.inputs])
            values.update(zip(instruction.outputs, y, strict=True))
        return [*data, *(values[slot].contiguous() for slot in self.slots)]


@dataclass(frozen=True)
class Callbacks:
    """All of a program, support and query.

    Attributes:
        calls: one a composition.
        failures: of them all.
    """

    calls: Sequence[Callback]
    failures: Failures
    _running: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def of_one_meta_step(self) -> Iterator[None]:
        """Forget afterwards what maps have kept, and raise what they have raised; other threads' meta-steps wait."""
        with self._running:
            try:
                yield
            finally:
                for call in self.calls:
                    call.forget()
                failure, self.failures.first = self.failures.first, None
                if failure is not None:
                    raise failure

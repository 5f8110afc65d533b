"""Several instructions as one operation, with the four maps of their composition."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastmeta.core.task_op import Need, TaskOp, Tensors, plus
from fastmeta.engine.program import Instruction


class Composite:
    """The composition of ``instructions``, in execution order.

    Every tensor carries the task axis, so that one task's do where there is one; nothing is shared.

    Args:
        instructions: each with one result that another one or the caller reads.
        inputs: the slots that come from elsewhere.
        output: the slot of the result.
    """

    def __init__(self, instructions: Sequence[Instruction], inputs: Sequence[int], output: int) -> None:
        self.instructions, self.inputs, self.output = tuple(instructions), tuple(inputs), output
        self.wanted = functools.cache(self._wanted)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensor, list[Tensors]]:
        """Return ``(y, saved)``."""
        values: dict[int, Any] = dict(zip(self.inputs, x, strict=True))
        saved = []
        for instruction in self.instructions:
            y, kept = instruction.op.forward([values[slot] for slot in instruction.inputs])
            values.update(zip(instruction.outputs, y, strict=True))
            saved.append(kept)
        return values[self.output], saved

    def backward(self, saved: Sequence[Tensors], d_y: Tensor, need: tuple[bool, ...]) -> Tensors:
        """Return a cotangent, or ``None``, for every input; ``need`` says which are wanted."""
        cotangents: dict[int, Any] = {self.output: d_y}
        for i, op, needs in self.wanted(need):
            instruction = self.instructions[i]
            d = tuple(cotangents.pop(slot, None) for slot in instruction.outputs)
            if any(each is not None for each in d):
                _add(cotangents, instruction, needs, op.backward(saved[i], d, needs))
        return self._of_inputs(cotangents, need)

    def tangent(self, saved: Sequence[Tensors], x_dot: Tensors) -> tuple[Tensor | None, list[Tensors | None]]:
        """Return ``(y_dot, saved_dot)``; ``None`` in ``x_dot`` is zero."""
        dots: dict[int, Any] = {slot: d for slot, d in zip(self.inputs, x_dot, strict=True) if d is not None}
        saved_dot: list[Tensors | None] = []
        for instruction, kept in zip(self.instructions, saved, strict=True):
            dot = tuple(dots.get(slot) for slot in instruction.inputs)
            if all(d is None for d in dot):
                saved_dot.append(None)
                continue
            y_dot, kept_dot = instruction.op.tangent(kept, dot)
            dots.update((slot, d) for slot, d in zip(instruction.outputs, y_dot, strict=True) if d is not None)
            saved_dot.append(kept_dot)
        return dots.get(self.output), saved_dot

    def tangent_backward(
        self,
        saved: Sequence[Tensors],
        saved_dot: Sequence[Tensors | None],
        d_y: Tensor,
        d_y_dot: Tensor,
        need: tuple[bool, ...],
    ) -> Tensors:
        """Return the tangent of what :meth:`backward` returns."""
        cotangents: dict[int, Any] = {self.output: d_y}
        dots: dict[int, Any] = {self.output: d_y_dot}
        for i, op, needs in self.wanted(need):
            instruction, kept_dot = self.instructions[i], saved_dot[i]
            d = tuple(cotangents.pop(slot, None) for slot in instruction.outputs)
            d_dot = tuple(dots.pop(slot, None) for slot in instruction.outputs)
            some, some_dot = any(each is not None for each in d), any(each is not None for each in d_dot)
            if kept_dot is not None and some:
                _add(dots, instruction, needs, op.tangent_backward(saved[i], kept_dot, d, d_dot, needs))
            elif some_dot:
                _add(dots, instruction, needs, op.backward(saved[i], d_dot, needs))
            if some:
                _add(cotangents, instruction, needs, op.backward(saved[i], d, needs))
        return self._of_inputs(dots, need)

    def _of_inputs(self, cotangents: dict[int, Any], need: tuple[bool, ...]) -> Tensors:
        return tuple(cotangents.get(slot) if want else None for slot, want in zip(self.inputs, need, strict=True))

    def _wanted(self, need: tuple[bool, ...]) -> list[tuple[int, TaskOp, tuple[Need, ...]]]:
        """Where cotangents flow if these inputs want one: the last instruction first, with what is wanted of each."""
        reached = {slot for slot, want in zip(self.inputs, need, strict=True) if want}
        found = []
        for i, instruction in enumerate(self.instructions):
            needs = tuple(Need.TASK if slot in reached else Need.NONE for slot in instruction.inputs)
            if any(needs):
                reached.update(instruction.outputs)
                found.append((i, instruction.op, needs))
        return found[::-1]


def _add(cotangents: dict[int, Any], instruction: Instruction, need: Sequence[Need], d_x: Tensors) -> None:
    for slot, wanted, d in zip(instruction.inputs, need, d_x, strict=True):
        if wanted and d is not None:
            cotangents[slot] = plus(cotangents.get(slot), d)

"""``aten.native_dropout``: random in the forward map, a fixed linear map in the other three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, registry
from fastmeta.ops.dropout import reference


@registry.register
class Dropout(TaskOp):
    """``y = m x``; saves the mask ``m``, so that a step's tangent sees the very mask its forward drew."""

    name: ClassVar[str] = "dropout"
    targets: ClassVar[tuple[str, ...]] = ("aten.native_dropout.default",)
    saved_names: ClassVar[tuple[str, ...]] = ("mask",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.p = float(call["p"])
        self.training = call["train"] is not False and self.p > 0
        self.random = self.training  # type: ignore[misc]  # of this call, where the class can only say "maybe"

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        if not self.training:
            return (x[0], x[0].new_ones(()).bool().expand(x[0].shape)), (None,)
        mask = reference.draw(x[0], self.p)
        return (reference.scale(x[0], mask), mask != 0), (mask,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return (self._map(saved, d_y[0]),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        return (self._map(saved, x_dot[0]), None), ()

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: Tensors, d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return (self._map(saved, d_y_dot[0]),)

    def _map(self, saved: tuple[Any, ...], value: Tensor | None) -> Tensor | None:
        return value if value is None or saved[0] is None else reference.scale(value, saved[0])

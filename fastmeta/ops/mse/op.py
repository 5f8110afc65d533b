"""Mean squared error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.mse import reference


@registry.register
class MSE(TaskOp):
    """``mean``, ``sum`` or each of ``(x - y)^2`` of every task; saves the difference.

    Raises :class:`Unsupported` where the two shapes or dtypes differ.
    """

    name: ClassVar[str] = "mse"
    targets: ClassVar[tuple[str, ...]] = ("aten.mse_loss.default",)
    saved_names: ClassVar[tuple[str, ...]] = ("difference",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        x, y = call.inputs
        if x.shape != y.shape or x.dtype != y.dtype:
            raise Unsupported(f"mse: input and target must agree, got {x.shape} {x.dtype} and {y.shape} {y.dtype}")
        self.reduction: int = call["reduction"]
        self.scale = 1.0 / max(1, math.prod(x.shape)) if self.reduction == 1 else 1.0

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        loss, difference = reference.forward(x[0], x[1], self.reduction)
        return (loss,), (difference,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return self._both(None if d_y[0] is None else reference.backward(saved[0], d_y[0], self.scale), need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        difference_dot = plus(x_dot[0], None if x_dot[1] is None else -x_dot[1])
        y_dot = reference.tangent(saved[0], difference_dot, self.scale, self.reduction != 0)  # type: ignore[arg-type]
        return (y_dot,), (difference_dot,)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self._both(reference.tangent_backward(saved[0], saved_dot[0], d_y[0], d_y_dot[0], self.scale), need)

    @staticmethod
    def _both(d: Tensor | None, need: Sequence[Need]) -> Tensors:
        if d is None:
            return None, None
        return d if need[0] else None, -d if need[1] else None

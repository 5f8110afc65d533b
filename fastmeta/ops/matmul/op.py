"""``aten.matmul``, ``aten.bmm`` and ``aten.mm`` of two matrices or stacks of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.matmul import reference


@registry.register
class Matmul(TaskOp):
    """``y = a b``; saves both factors."""

    name: ClassVar[str] = "matmul"
    targets: ClassVar[tuple[str, ...]] = ("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
    saved_names: ClassVar[tuple[str, ...]] = ("left", "right")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if any(len(i.shape) < 2 for i in call.inputs):
            raise Unsupported("matmul: a factor is a vector")
        if len({i.dtype for i in call.inputs}) > 1 or not call.inputs[0].dtype.is_floating_point:
            raise Unsupported("matmul: factors must be floating-point and of one dtype")

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        return (reference.product(x[0], x[1]),), (x[0], x[1])

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        a, b = saved
        return self._left(d_y[0], b, need), self._right(a, d_y[0], need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        a, b = saved
        left = None if x_dot[0] is None else reference.product(x_dot[0], b)
        right = None if x_dot[1] is None else reference.product(a, x_dot[1])
        return (plus(left, right),), (x_dot[0], x_dot[1])

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (a, b), (a_dot, b_dot) = saved, saved_dot
        return (
            plus(self._left(d_y_dot[0], b, need), self._left(d_y[0], b_dot, need)),
            plus(self._right(a, d_y_dot[0], need), self._right(a_dot, d_y[0], need)),
        )

    def flops(self) -> int:
        return 2 * math.prod(self.call.outputs[0].shape) * self.call.inputs[0].shape[-1]

    def _left(self, d: Tensor | None, b: Tensor | None, need: Sequence[Need]) -> Tensor | None:
        """``d b^T``, in the left factor's shape."""
        if d is None or b is None or not need[0]:
            return None
        return reference.reduce(reference.product(d, b.mT), self.call.inputs[0].shape)

    def _right(self, a: Tensor | None, d: Tensor | None, need: Sequence[Need]) -> Tensor | None:
        """``a^T d``, in the right factor's shape."""
        if a is None or d is None or not need[1]:
            return None
        return reference.reduce(reference.product(a.mT, d), self.call.inputs[1].shape)

"""Mean squared error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.mse import reference
from fastmeta.ops.mse.reference import MEAN, NONE


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
        self.scale = 1.0 / max(1, math.prod(x.shape)) if self.reduction == MEAN else 1.0

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        self.backend = "triton" if self._on_gpu(x[0]) else "reference"
        if self.backend == "triton":
            from fastmeta.ops.mse import triton

            loss, difference = triton.forward(x[0], x[1], self.reduction)
        else:
            loss, difference = reference.forward(x[0], x[1], self.reduction)
        return (loss,), (difference,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None:
            return None, None
        if self._on_gpu(saved[0]):
            return self._by_kernels(saved[0], None, None, d_y[0], need)
        return self._both(reference.backward(saved[0], d_y[0], self.scale), need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if self._on_gpu(saved[0]):
            from fastmeta.ops.mse import triton

            l_dot, moved = triton.tangent(saved[0], x_dot[0], x_dot[1], self.scale)
            return (l_dot,), (moved,)
        difference_dot = plus(x_dot[0], None if x_dot[1] is None else -x_dot[1])
        y_dot = reference.tangent(saved[0], difference_dot, self.scale, self.reduction != NONE)  # type: ignore[arg-type]
        return (y_dot,), (difference_dot,)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (e,), (e_dot,), (d_l,), (d_l_dot,) = saved, saved_dot, d_y, d_y_dot
        if self._on_gpu(e) and (d_l_dot is not None or (d_l is not None and e_dot is not None)):
            return self._by_kernels(e, e_dot, d_l, d_l_dot, need)
        return self._both(reference.tangent_backward(e, e_dot, d_l, d_l_dot, self.scale), need)

    def _on_gpu(self, x: Tensor) -> bool:
        """Whether Triton's kernels run: for the mean or the sum."""
        return self.reduction != NONE and x.is_cuda and not triton_support.missing_reason(x.device, x.dtype)

    def _by_kernels(
        self, e: Tensor, e_dot: Tensor | None, d_l: Tensor | None, d_l_dot: Tensor | None, need: Sequence[Need]
    ) -> Tensors:
        from fastmeta.ops.mse import triton

        return triton.cotangents(e, e_dot, d_l, d_l_dot, self.scale, bool(need[0]), bool(need[1]))

    @staticmethod
    def _both(d: Tensor | None, need: Sequence[Need]) -> Tensors:
        if d is None:
            return None, None
        return d if need[0] else None, -d if need[1] else None

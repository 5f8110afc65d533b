"""``aten.add`` of two tensors, an activation, or both as one operation with fused kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.curves import BENT, curve_of
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported

SUM = "aten.add.Tensor"


class SumBlock(TaskOp):
    """``y = f(a + b)`` or ``y = f(a)`` of tensors ``[T, ...]`` of one shape; saves what ``f'`` is a function of.

    The kernels are Triton's, for float32 on a GPU: a pass over elements a map, and none where a sum alone goes back.

    Args:
        total: the call of ``aten.add``, or ``None``.
        activation: the call that reads its result, or ``None``.

    Raises:
        Unsupported: no float32, other shapes, a factor, or an activation without kernels.
    """

    name: ClassVar[str] = "sum_block"
    backend: str = "triton"
    saved_names: ClassVar[tuple[str, ...]] = ("result or its argument",)

    def __init__(self, total: Call | None, activation: Call | None) -> None:
        calls = [call for call in (total, activation) if call is not None]
        super().__init__(dataclasses.replace(calls[0], outputs=calls[-1].outputs))
        shape = calls[0].outputs[0].shape
        if total is not None and (str(total.target) != SUM or len(total.inputs) != 2 or total["alpha"] != 1):
            raise Unsupported("sum_block: the sum must be of two tensors, without a factor")
        inputs = calls[0].inputs
        if any(i.shape != shape or i.dtype is not torch.float32 for i in inputs):
            raise Unsupported("sum_block: everything must be float32 and of one shape")
        self.curve = curve_of(activation)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        from fastmeta.ops.sum_block import triton

        y, s = triton.forward(self.curve, x[0], x[1] if len(x) > 1 else None)
        return (y,), (s,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return self._both(d_y[0] if self._straight else self._derivative(saved[0], d_y[0])[0], need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        given = [dot for dot in x_dot if dot is not None]
        if not given or (self._straight and len(given) == 1):
            return (given[0] if given else None,), (None,)
        bent = self.curve.kind in BENT
        y_dot, total = self._derivative(saved[0], *given, keep=bent and len(given) > 1)
        return (y_dot,), (given[0] if bent and total is None else total,)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        pair = saved_dot[0], d_y[0]
        bent = None if pair[0] is None or pair[1] is None else pair
        if self._straight or (bent is None and d_y_dot[0] is None):
            return self._both(d_y_dot[0], need)
        return self._both(self._derivative(saved[0], d_y_dot[0], None, bent)[0], need)

    @property
    def _straight(self) -> bool:
        """Whether the sum is the result."""
        return self.curve.kind == "identity"

    def _derivative(self, s: Tensor, *given: Any, keep: bool = False) -> tuple[Tensor, Tensor | None]:
        from fastmeta.ops.sum_block import triton

        return triton.derivative(self.curve, s, *given, keep=keep)

    def _both(self, d: Tensor | None, need: Sequence[Need]) -> Tensors:
        return tuple(d if want else None for want in need)

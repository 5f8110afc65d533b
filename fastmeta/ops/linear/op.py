"""``aten.linear``: an affine map whose weight and bias tasks may share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.low_rank import LowRank
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.linear import reference


@registry.register
class Linear(TaskOp):
    """``y = x W^T + b`` on ``x [T, ..., in]``; weight ``[out, in]`` or ``[T, out, in]``, bias likewise.

    The weight may also come as :class:`LowRank`, and its cotangent go as one (``Need.FACTORS``).

    Saves ``x`` as rows and the weight. Raises :class:`Unsupported` for a weight that is not a matrix or not of the
    input's dtype.
    """

    name: ClassVar[str] = "linear"
    targets: ClassVar[tuple[str, ...]] = ("aten.linear.default",)
    shares: ClassVar[tuple[str, ...]] = ("weight", "bias")
    saved_names: ClassVar[tuple[str, ...]] = ("input", "weight")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        x, weight, bias = call["input"], call["weight"], call["bias"]
        if len(weight.shape) != 2:
            raise Unsupported(f"linear: weight must be a matrix, got shape {weight.shape}")
        if len({i.dtype for i in call.inputs}) > 1:
            raise Unsupported("linear: input, weight and bias must have one dtype")
        self.has_bias = bias is not None
        self.rows = math.prod(x.shape[:-1])
        self.fan_out, self.fan_in = weight.shape
        self.is_rows = len(x.shape) == 2  # then [T, N, in] is what the maths takes, and no view is needed
        self.x_shape = tuple(x.shape)
        self.y_shape = call.outputs[0].shape

    def _rows(self, value: Any) -> Any:
        if value is None or self.is_rows:
            return value
        return value.reshape(value.shape[0], self.rows, value.shape[-1])

    def _shaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        return value if value is None or self.is_rows else value.reshape(value.shape[0], *shape)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        rows, weight = self._rows(x[0]), x[1]
        y = reference.forward(rows, weight, x[2] if self.has_bias else None)
        return (self._shaped(y, self.y_shape),), (rows, weight)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        x, weight = saved
        d = self._rows(d_y[0])
        d_x = self._shaped(reference.input_cotangent(d, weight), self.x_shape) if need[0] else None
        d_weight: Any = None
        if need[1] is Need.FACTORS:
            d_weight = LowRank(None, reference.weight_factors(d, x))
        elif need[1]:
            d_weight = reference.weight_cotangent(d, x, need[1] is Need.SHARED)
        if not self.has_bias:
            return d_x, d_weight
        return d_x, d_weight, reference.bias_cotangent(d, need[2] is Need.SHARED) if need[2] else None

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        x, weight = saved
        dot, weight_dot = self._rows(x_dot[0]), x_dot[1]
        y_dot = reference.tangent(x, weight, dot, weight_dot, x_dot[2] if self.has_bias else None)
        return (self._shaped(y_dot, self.y_shape),), (dot, weight_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (x, weight), (x_dot, weight_dot) = saved, saved_dot
        d, d_dot = self._rows(d_y[0]), self._rows(d_y_dot[0])
        d_x_dot = d_bias_dot = None
        d_weight_dot: Any = None
        if need[0]:
            d_x_dot = self._shaped(reference.input_cotangent_dot(d, d_dot, weight, weight_dot), self.x_shape)
        if need[1] is Need.FACTORS:
            factors = reference.weight_factors(d_dot, x) + reference.weight_factors(d, x_dot)
            d_weight_dot = LowRank(None, factors) if factors else None
        elif need[1]:
            d_weight_dot = reference.weight_cotangent_dot(d, d_dot, x, x_dot, need[1] is Need.SHARED)
        if not self.has_bias:
            return d_x_dot, d_weight_dot
        if need[2] and d_dot is not None:
            d_bias_dot = reference.bias_cotangent(d_dot, need[2] is Need.SHARED)
        return d_x_dot, d_weight_dot, d_bias_dot

    def flops(self) -> int:
        return 2 * self.rows * self.fan_in * self.fan_out

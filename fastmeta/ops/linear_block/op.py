"""``aten.linear`` and the activation that follows, as one operation with fused kernels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.curves import BENT, BY_INPUT, bend, curve_of, slope
from fastmeta.core.product import product
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus


class LinearBlock(TaskOp):
    """``y = f(x W^T + b)`` on ``x [T, ..., in]``; weight ``[out, in]`` or ``[T, out, in]``, bias likewise.

    The kernels are Triton's, for float32 on a GPU. Saves ``x`` as rows, the weight, and what ``f'`` is a function of.

    Args:
        linear: the call of ``aten.linear``.
        activation: the call that reads its result, or ``None``.

    Raises:
        Unsupported: no float32, a weight that is no matrix, or an activation without kernels.
    """

    name: ClassVar[str] = "linear_block"
    backend: str = "triton"
    shares: ClassVar[tuple[str, ...]] = ("weight", "bias")
    saved_names: ClassVar[tuple[str, ...]] = ("input", "weight", "result or its argument")

    def __init__(self, linear: Call, activation: Call | None) -> None:
        result = linear if activation is None else activation
        super().__init__(dataclasses.replace(linear, outputs=result.outputs))
        x, weight = linear["input"], linear["weight"]
        if len(weight.shape) != 2 or {i.dtype for i in linear.inputs} != {torch.float32}:
            raise Unsupported("linear_block: weight must be a matrix, and everything float32")
        self.curve = curve_of(activation)
        self.has_bias = linear["bias"] is not None
        self.rows = math.prod(x.shape[:-1])
        self.fan_out, self.fan_in = weight.shape
        self.x_shape, self.y_shape = tuple(x.shape), tuple(linear.outputs[0].shape)

    def _flat(self, value: Any) -> Any:
        return value if value is None else value.reshape(value.shape[0], self.rows, value.shape[-1])

    def _shaped(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        return value.view(value.shape[0], *shape)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        from fastmeta.ops.linear_block import triton

        flat = self._flat(x[0])
        by_input = self.curve.kind in BY_INPUT
        y, z = triton.rows(self.curve, flat, x[1], x[2] if self.has_bias else None, keep=by_input)
        return (self._shaped(y, self.y_shape),), (flat, x[1], z if by_input else y)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        from fastmeta.ops.linear_block import triton

        x, weight, s = saved
        d = self._flat(d_y[0])
        d_x, d_w, d_b = None, None, None
        of_x, of_weight = bool(need[0]), Need.TASK in need[1:]
        if of_x or of_weight:
            args = self.curve, s, d, x, weight
            d_x, d_w, d_b = triton.cotangents(*args, of_x=of_x, of_weight=of_weight, bias=self.has_bias)
        d_x = None if d_x is None else self._shaped(d_x, self.x_shape)
        if Need.SHARED in need[1:]:
            d_w, d_b = self._over_tasks(slope(self.curve, s) * d, x, d_w, d_b, need)
        return self._wanted(d_x, d_w, d_b, need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        from fastmeta.ops.linear_block import triton

        x, weight, s = saved
        dot, weight_dot = self._flat(x_dot[0]), x_dot[1]
        bias_dot = x_dot[2] if self.has_bias else None
        bent = self.curve.kind in BENT
        first, second = (dot, weight), (x if weight_dot is not None else None, weight_dot)
        if dot is None:  # then the one product is x W_dot^T, or none
            first, second = second, (None, None)
        y_dot: Tensor
        z_dot: Tensor | None
        if first[0] is not None:
            y_dot, z_dot = triton.rows(self.curve, *first, bias_dot, *second, s=s, keep=bent)
        elif bias_dot is not None:
            z_dot = bias_dot.unsqueeze(1).expand_as(s)
            y_dot = slope(self.curve, s) * z_dot
        else:
            return (None,), (None, None, None)
        return (self._shaped(y_dot, self.y_shape),), (dot, weight_dot, z_dot if bent else None)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        from fastmeta.ops.linear_block import triton

        (x, weight, s), (x_dot, weight_dot, z_dot) = saved, saved_dot
        d, d_dot = self._flat(d_y[0]), self._flat(d_y_dot[0])
        d_x, d_w, d_b = None, None, None
        of_x, of_weight = bool(need[0]), Need.TASK in need[1:]
        if of_x or of_weight:
            args = self.curve, s, d, x, weight, d_dot, z_dot, x_dot, weight_dot
            d_x, d_w, d_b = triton.cotangents(*args, tangent=True, of_x=of_x, of_weight=of_weight, bias=self.has_bias)
        d_x = None if d_x is None else self._shaped(d_x, self.x_shape)
        if Need.SHARED in need[1:]:
            d_z_dot = self._bent(s, d, d_dot, z_dot)
            d_w, d_b = self._over_tasks(d_z_dot, x, d_w, d_b, need)
            if need[1] is Need.SHARED and x_dot is not None and d is not None:
                d_z = slope(self.curve, s) * d
                d_w = plus(d_w, product(d_z.flatten(0, 1).t(), x_dot.flatten(0, 1)))
        return self._wanted(d_x, d_w, d_b, need)

    def flops(self) -> int:
        return 2 * self.rows * self.fan_in * self.fan_out

    def _bent(self, s: Tensor, d: Tensor | None, d_dot: Tensor | None, z_dot: Tensor | None) -> Tensor:
        """``d_z_dot``."""
        straight = torch.zeros_like(s) if d_dot is None else slope(self.curve, s) * d_dot
        if d is None or z_dot is None:
            return straight
        return straight + bend(self.curve, s) * z_dot * d

    def _over_tasks(
        self, d_z: Tensor, x: Tensor, d_w: Tensor | None, d_b: Tensor | None, need: Sequence[Need]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Cotangents of what tasks share, summed over them; those of the others as they are."""
        if need[1] is Need.SHARED:
            d_w = product(d_z.flatten(0, 1).t(), x.flatten(0, 1))
        if self.has_bias and need[2] is Need.SHARED:
            d_b = d_z.sum((0, 1))
        return d_w, d_b

    def _wanted(self, d_x: Tensor | None, d_w: Tensor | None, d_b: Tensor | None, need: Sequence[Need]) -> Tensors:
        results = (d_x, d_w, d_b) if self.has_bias else (d_x, d_w)
        return tuple(d if want else None for d, want in zip(results, need, strict=True))

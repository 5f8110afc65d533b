"""``aten.conv2d``: a convolution whose weight and bias tasks may share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.conv2d import reference
from fastmeta.ops.conv2d.reference import Geometry


@registry.register
class Conv2d(TaskOp):
    """``y = x * W + b`` on ``x [T, N, I, H, W]``; saves the input (as images or as patches) and the weight.

    Raises:
        Unsupported: an image without batch axis, mixed dtypes, or ``padding="same"`` that is not symmetric.
    """

    name: ClassVar[str] = "conv2d"
    targets: ClassVar[tuple[str, ...]] = ("aten.conv2d.default", "aten.conv2d.padding")
    shares: ClassVar[tuple[str, ...]] = ("weight", "bias")
    saved_names: ClassVar[tuple[str, ...]] = ("input or patches", "weight")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if len(call["input"].shape) != 4:
            raise Unsupported("conv2d: an image without batch axis")
        if len({i.dtype for i in call.inputs}) > 1:
            raise Unsupported("conv2d: input, weight and bias must have one dtype")
        weight_shape = tuple(call["weight"].shape)
        stride, dilation = _pair(call["stride"]), _pair(call["dilation"])
        padding = _padding(call["padding"], weight_shape[2:], dilation)
        shapes = tuple(call["input"].shape), weight_shape, tuple(call.outputs[0].shape)
        self.geometry = Geometry(stride, padding, dilation, call["groups"], *shapes)
        self.has_bias = call["bias"] is not None

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        kept = reference.keep(x[0], self.geometry)
        y = reference.forward(kept, x[1], x[2] if self.has_bias else None, self.geometry)
        return (y,), (kept, x[1])

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        x, weight = saved
        d, geometry = d_y[0], self.geometry
        if d is None:
            return (None,) * len(self.call.inputs)
        d_x = reference.input_cotangent(d, weight, geometry) if need[0] else None
        d_w = reference.weight_cotangent(d, x, geometry, need[1] is Need.SHARED) if need[1] else None
        return self._results(d_x, d_w, d, need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        x, weight = saved
        dot, weight_dot = x_dot[0], x_dot[1]
        bias_dot = x_dot[2] if self.has_bias else None
        y_dot = reference.tangent(x, weight, dot, weight_dot, bias_dot, self.geometry)
        if y_dot is None and bias_dot is not None:
            shape = self.call.outputs[0].shape
            y_dot = bias_dot[:, None, :, None, None].expand(bias_dot.shape[0], *shape)
        return (y_dot,), (dot, weight_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (x, weight), (x_dot, weight_dot) = saved, saved_dot
        d, d_dot, geometry = d_y[0], d_y_dot[0], self.geometry
        d_x_dot = d_w_dot = None
        if need[0]:
            d_x_dot = reference.input_cotangent_dot(d, d_dot, weight, weight_dot, geometry)
        if need[1]:
            shared = need[1] is Need.SHARED
            d_w_dot = reference.weight_cotangent_dot(d, d_dot, x, x_dot, geometry, shared)
        return self._results(d_x_dot, d_w_dot, d_dot, need)

    def flops(self) -> int:
        return self.geometry.flops

    def _results(self, d_x: Tensor | None, d_w: Tensor | None, d: Tensor | None, need: Sequence[Need]) -> Tensors:
        if not self.has_bias:
            return d_x, d_w
        d_b = reference.bias_cotangent(d, need[2] is Need.SHARED) if need[2] and d is not None else None
        return d_x, d_w, d_b


def _pair(value: Sequence[int]) -> tuple[int, ...]:
    return tuple(value) * 2 if len(value) == 1 else tuple(value)


def _padding(value: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, str):
        return _pair(value)
    if value == "valid":
        return (0, 0)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(t % 2 for t in total):
        raise Unsupported("conv2d: padding 'same' that is not symmetric")
    return tuple(t // 2 for t in total)

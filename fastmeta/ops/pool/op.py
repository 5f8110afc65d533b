"""``aten.max_pool2d``, ``aten.avg_pool2d`` and ``aten.adaptive_avg_pool2d``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.pool import reference


class _Pool(TaskOp):
    """A pool whose tangent is linear: what max and average pooling share."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if len(call.inputs[0].shape) != 4:
            raise Unsupported(f"{self.name}: an image without batch axis")
        self.size = call.inputs[0].shape[2:]
        self.pooled = call.outputs[0].shape[2:]

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: Tensors, d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return (None,) if d_y_dot[0] is None else self.backward(saved, (d_y_dot[0],), need)


@registry.register
class MaxPool(_Pool):
    """Largest value of each window; saves its position, the first one where several are equal."""

    name: ClassVar[str] = "max_pool"
    targets: ClassVar[tuple[str, ...]] = ("aten.max_pool2d.default",)
    saved_names: ClassVar[tuple[str, ...]] = ("positions",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.kernel = _pair(call["kernel_size"])
        self.stride = _pair(call["stride"]) or self.kernel
        self.padding, self.dilation = _pair(call["padding"]), _pair(call["dilation"])
        self.ceil = call["ceil_mode"]
        self.overlap = self.dilation != (1, 1) or any(s < k for s, k in zip(self.stride, self.kernel, strict=True))

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        flat = x[0].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        y, positions = torch.ops.aten.max_pool2d_with_indices.default(
            flat, self.kernel, self.stride, self.padding, self.dilation, self.ceil
        )
        return (y.unflatten(0, x[0].shape[:2]),), (reference.pixels(positions),)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None:
            return (None,)
        rows = reference.pixels(d_y[0].flatten(0, 1))
        d_x = reference.scatter(rows, saved[0], self.size, overlap=self.overlap)
        return (d_x.unflatten(0, d_y[0].shape[:2]),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if x_dot[0] is None:
            return (None,), ()
        rows = reference.gather(x_dot[0].flatten(0, 1), saved[0])
        return (reference.image(rows, self.pooled).unflatten(0, x_dot[0].shape[:2]),), ()


@registry.register
class AveragePool(_Pool):
    """Mean of each window, fixed or adaptive; linear, so that nothing is saved."""

    name: ClassVar[str] = "avg_pool"
    targets: ClassVar[tuple[str, ...]] = (
        "aten.avg_pool2d.default",
        "aten.adaptive_avg_pool2d.default",
        "aten._adaptive_avg_pool2d.default",
    )
    saved_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.adaptive = "adaptive" in str(call.target)
        if not self.adaptive:
            kernel = _pair(call["kernel_size"])
            self.arguments = (
                kernel,
                _pair(call["stride"]) or kernel,
                _pair(call["padding"]),
                call["ceil_mode"],
                call["count_include_pad"],
                call["divisor_override"],
            )

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        return (self._pool(x[0]),), ()

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None:
            return (None,)
        lead = d_y[0].shape[:3]
        if self.adaptive:
            rows, columns = self._matrices(d_y[0])
            return (rows.mT @ d_y[0] @ columns,)
        d = d_y[0].flatten(0, 1)
        like = d.new_empty(1).expand(*d.shape[:2], *self.size)  # only its shape is read
        d_x = torch.ops.aten.avg_pool2d_backward.default(d, like, *self.arguments)
        return (d_x.view(*lead, *self.size),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        return (None if x_dot[0] is None else self._pool(x_dot[0]),), ()

    def _pool(self, x: Tensor) -> Tensor:
        if self.adaptive:
            if math.prod(self.pooled) == 1:
                return x.mean((3, 4), keepdim=True)
            rows, columns = self._matrices(x)
            return rows @ x @ columns.mT
        y = torch.ops.aten.avg_pool2d.default(x.flatten(0, 1), *self.arguments)
        return y.unflatten(0, x.shape[:2])

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Averages along the rows and along the columns."""
        (height, width), (h, w) = self.size, self.pooled
        return reference.adaptive_matrix(height, h, like), reference.adaptive_matrix(width, w, like)


def _pair(value: Sequence[int]) -> tuple[int, ...]:
    return tuple(value) * 2 if len(value) == 1 else tuple(value)

"""Max, average and adaptive average pooling of images."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.pool import reference
from fastmeta.ops.pool.reference import Window

LARGEST = 1 << 27  # elements of an image that a GPU's kernels take: they count these in int32


def _pair(value: Sequence[int] | int) -> tuple[int, ...]:
    pair = (value,) if isinstance(value, int) else tuple(value)
    return pair * 2 if len(pair) == 1 else pair


class Pool(TaskOp):
    """Pooling of ``[T, N, C, H, W]`` or ``[T, C, H, W]``; all tasks' images are pooled in one call.

    Raises :class:`Unsupported` for integers.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if not call["self"].dtype.is_floating_point:
            raise Unsupported(f"{self.name}: input must be floating, got {call['self'].dtype}")
        self.shape, self.result = tuple(call["self"].shape), tuple(call.outputs[0].shape)
        self.images = math.prod(self.shape[:-3])
        largest = max(math.prod(shape[-3:]) for shape in (self.shape, self.result))
        sides = zip(self.shape[-2:], self.result[-2:], strict=True)  # their product bounds adaptive windows
        self.fits_kernels = largest <= LARGEST and all((a + 1) * (b + 1) < 1 << 31 for a, b in sides)

    def _window(self) -> Window:
        get = self.call.arguments.get
        size = self.call["kernel_size"]
        return Window(
            _pair(size),
            _pair(get("stride") or size),
            _pair(get("padding", 0)),
            _pair(get("dilation", 1)),
            bool(get("ceil_mode")),
        )

    def _planes(self, value: Tensor) -> Tensor:
        """``[T, ..., C, H, W] -> [B, C, H, W]``, channels last in memory."""
        planes = value if value.dim() == 4 else value.flatten(0, 1)
        return planes.contiguous(memory_format=torch.channels_last)

    def _tasks(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        return value if len(shape) == 3 else value.unflatten(0, (-1, shape[0]))

    def _size(self, d: Tensor) -> tuple[int, ...]:
        return (d.shape[0] * self.images, *self.shape[-3:])

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None or not need[0]:
            return (None,)
        return (self._tasks(self._transpose(self._planes(d_y[0]), saved, self._size(d_y[0])), self.shape),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        dot: Any = x_dot[0]
        y_dot = self._tasks(self._push(self._planes(dot), saved), self.result)
        return (y_dot, *(None,) * (len(self.call.outputs) - 1)), ()

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self.backward(saved, d_y_dot, need)

    def _on_gpu(self, value: Tensor) -> bool:
        """Whether Triton's kernels run."""
        return self.fits_kernels and value.is_cuda and not triton_support.missing_reason(value.device, value.dtype)

    def _linear(self, x: Tensor) -> tuple[Tensors, Tensors]:
        """The forward map of a pooling that is linear."""
        if self._on_gpu(x):
            self.backend = "triton"
        return (self._tasks(self._push(self._planes(x), ()), self.result),), ()

    @abstractmethod
    def _push(self, x_dot: Tensor, saved: tuple[Any, ...]) -> Tensor:
        """``L x_dot``."""

    @abstractmethod
    def _transpose(self, d: Tensor, saved: tuple[Any, ...], size: tuple[int, ...]) -> Tensor:
        """``L^T d``."""


@registry.register
class MaxPool(Pool):
    """Maximum of every window; saves where it lies, as int64 or, for kernels that alone read it, int32."""

    name: ClassVar[str] = "max_pool"
    targets: ClassVar[tuple[str, ...]] = ("aten.max_pool2d.default", "aten.max_pool2d_with_indices.default")
    saved_names: ClassVar[tuple[str, ...]] = ("positions of the maxima",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.window = self._window()

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        planes = self._planes(x[0])
        if self._on_gpu(planes):
            from fastmeta.ops.pool import triton

            self.backend = "triton"
            positions = torch.int32 if len(self.call.outputs) == 1 else torch.int64
            y, where = triton.maximum(planes, self.window, self.result[-2:], positions)
        else:
            y, where = reference.maximum(planes, self.window)
        outputs = (self._tasks(y, self.result), self._tasks(where, self.result))
        return outputs[: len(self.call.outputs)], (where,)

    def _push(self, x_dot: Tensor, saved: tuple[Any, ...]) -> Tensor:
        if self._on_gpu(x_dot):
            from fastmeta.ops.pool import triton

            return triton.maximum_tangent(x_dot, saved[0])
        return reference.maximum_tangent(x_dot, saved[0])

    def _transpose(self, d: Tensor, saved: tuple[Any, ...], size: tuple[int, ...]) -> Tensor:
        if self._on_gpu(d):
            from fastmeta.ops.pool import triton

            return triton.maximum_transpose(d, saved[0], self.window, size)
        return reference.maximum_transpose(d, saved[0], self.window, size)


@registry.register
class AveragePool(Pool):
    """Mean of every window; nothing is saved."""

    name: ClassVar[str] = "average_pool"
    targets: ClassVar[tuple[str, ...]] = ("aten.avg_pool2d.default",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.window = self._window()
        self.rule = call["count_include_pad"], call["divisor_override"]

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        return self._linear(x[0])

    def _push(self, x_dot: Tensor, saved: tuple[Any, ...]) -> Tensor:
        if self._on_gpu(x_dot):
            from fastmeta.ops.pool import triton

            return triton.average(x_dot, self.window, *self.rule, self.result[-2:])
        return reference.average(x_dot, self.window, *self.rule)

    def _transpose(self, d: Tensor, saved: tuple[Any, ...], size: tuple[int, ...]) -> Tensor:
        if self._on_gpu(d):
            from fastmeta.ops.pool import triton

            return triton.average_transpose(d, self.window, *self.rule, size)
        return reference.average_transpose(d, self.window, *self.rule, size)


@registry.register
class AdaptiveAveragePool(Pool):
    """Mean of the windows that divide an image into a given size; nothing is saved."""

    name: ClassVar[str] = "adaptive_average_pool"
    targets: ClassVar[tuple[str, ...]] = ("aten.adaptive_avg_pool2d.default", "aten._adaptive_avg_pool2d.default")

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        return self._linear(x[0])

    def _push(self, x_dot: Tensor, saved: tuple[Any, ...]) -> Tensor:
        if self._on_gpu(x_dot):
            from fastmeta.ops.pool import triton

            return triton.adaptive(x_dot, self.result[-2:])
        return reference.adaptive(x_dot, self.result[-2:])

    def _transpose(self, d: Tensor, saved: tuple[Any, ...], size: tuple[int, ...]) -> Tensor:
        if self._on_gpu(d):
            from fastmeta.ops.pool import triton

            return triton.adaptive_transpose(d, size)
        return reference.adaptive_transpose(d, size)

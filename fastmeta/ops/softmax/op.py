"""``aten.softmax`` and ``aten.log_softmax``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.softmax import reference

WIDEST = 8192  # elements of a row that a GPU's kernels keep in registers


class _AlongAxis(TaskOp):
    """What softmax and log-softmax read from their call."""

    saved_names: ClassVar[tuple[str, ...]] = ("probabilities",)
    log: ClassVar[bool]

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if call.outputs[0].dtype != call.inputs[0].dtype:
            raise Unsupported(f"{self.name}: a change of dtype on the way")
        shape = call.inputs[0].shape
        if not shape:
            raise Unsupported(f"{self.name}: a number without axes")
        self.dim = call["dim"] if call["dim"] < 0 else call["dim"] - len(shape)
        self.fits_kernels = self.dim == -1 and 0 < shape[-1] <= WIDEST

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        if d_y[0] is None or saved_dot[0] is None:
            return self.backward(saved, d_y_dot, need)
        if self._on_gpu(saved[0]):
            from fastmeta.ops.softmax import triton

            return (triton.bent(saved[0], saved_dot[0], d_y[0], d_y_dot[0], self.log),)
        (d_x_dot,) = self.backward(saved, d_y_dot, need)
        return (plus(d_x_dot, self._bend(saved[0], saved_dot[0], d_y[0])),)

    def _on_gpu(self, x: Tensor) -> bool:
        """Whether Triton's kernels run."""
        return self.fits_kernels and x.is_cuda and not triton_support.missing_reason(x.device, x.dtype)

    @abstractmethod
    def _bend(self, p: Tensor, y_dot: Tensor, d: Tensor) -> Tensor:
        """The second-order part of the tangent-backward: of the cotangent ``d``, in direction ``y_dot``."""


@registry.register
class Softmax(_AlongAxis):
    """``p = softmax(x)``; saves ``p``."""

    name: ClassVar[str] = "softmax"
    targets: ClassVar[tuple[str, ...]] = ("aten.softmax.int", "aten._softmax.default")
    log: ClassVar[bool] = False

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        if self._on_gpu(x[0]):
            from fastmeta.ops.softmax import triton

            self.backend = "triton"
            p, _ = triton.forward(x[0], log=False)
        else:
            p = torch.softmax(x[0], self.dim)
        return (p,), (p,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return (self._derivative(saved[0], d_y[0]),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        p_dot = self._derivative(saved[0], x_dot[0])
        return (p_dot,), (p_dot,)

    def _derivative(self, p: Tensor, v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        if self._on_gpu(p):
            from fastmeta.ops.softmax import triton

            return triton.linear(p, v, triton.DERIVATIVE)
        return reference.derivative(p, v, self.dim)

    def _bend(self, p: Tensor, p_dot: Tensor, d: Tensor) -> Tensor:
        return reference.cotangent_dot(p, p_dot, d, self.dim)


@registry.register
class LogSoftmax(_AlongAxis):
    """``y = log softmax(x)``; saves ``p = exp y``."""

    name: ClassVar[str] = "log_softmax"
    targets: ClassVar[tuple[str, ...]] = ("aten.log_softmax.int", "aten._log_softmax.default")
    log: ClassVar[bool] = True

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        if self._on_gpu(x[0]):
            from fastmeta.ops.softmax import triton

            self.backend = "triton"
            p, y = triton.forward(x[0], log=True)
            return (y,), (p,)
        y = torch.log_softmax(x[0], self.dim)
        return (y,), (y.exp(),)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None:
            return (None,)
        if self._on_gpu(saved[0]):
            from fastmeta.ops.softmax import triton

            return (triton.linear(saved[0], d_y[0], triton.LOG_BACKWARD),)
        return (reference.log_backward(saved[0], d_y[0], self.dim),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if x_dot[0] is None:
            return (None,), (None,)
        if self._on_gpu(saved[0]):
            from fastmeta.ops.softmax import triton

            y_dot = triton.linear(saved[0], x_dot[0], triton.LOG_TANGENT)
        else:
            y_dot = reference.log_tangent(saved[0], x_dot[0], self.dim)
        return (y_dot,), (y_dot,)

    def _bend(self, p: Tensor, y_dot: Tensor, d: Tensor) -> Tensor:
        return -(p * y_dot * reference.total(d, self.dim))

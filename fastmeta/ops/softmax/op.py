"""``aten.softmax`` and ``aten.log_softmax``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.softmax import reference


class _AlongAxis(TaskOp):
    """What softmax and log-softmax read from their call."""

    saved_names: ClassVar[tuple[str, ...]] = ("probabilities",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if call.outputs[0].dtype != call.inputs[0].dtype:
            raise Unsupported(f"{self.name}: a change of dtype on the way")
        if not call.inputs[0].shape:
            raise Unsupported(f"{self.name}: a number without axes")
        self.dim = call["dim"] if call["dim"] < 0 else call["dim"] - len(call.inputs[0].shape)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (d_x_dot,) = self.backward(saved, d_y_dot, need)
        if d_y[0] is None or saved_dot[0] is None:
            return (d_x_dot,)
        return (plus(d_x_dot, self._bend(saved[0], saved_dot[0], d_y[0])),)

    @abstractmethod
    def _bend(self, p: Tensor, y_dot: Tensor, d: Tensor) -> Tensor:
        """The second-order part of the tangent-backward: of the cotangent ``d``, in direction ``y_dot``."""


@registry.register
class Softmax(_AlongAxis):
    """``p = softmax(x)``; saves ``p``."""

    name: ClassVar[str] = "softmax"
    targets: ClassVar[tuple[str, ...]] = ("aten.softmax.int", "aten._softmax.default")

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        p = torch.softmax(x[0], self.dim)
        return (p,), (p,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return (None if d_y[0] is None else reference.derivative(saved[0], d_y[0], self.dim),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        p_dot = None if x_dot[0] is None else reference.derivative(saved[0], x_dot[0], self.dim)
        return (p_dot,), (p_dot,)

    def _bend(self, p: Tensor, p_dot: Tensor, d: Tensor) -> Tensor:
        return reference.cotangent_dot(p, p_dot, d, self.dim)


@registry.register
class LogSoftmax(_AlongAxis):
    """``y = log softmax(x)``; saves ``p = exp y``."""

    name: ClassVar[str] = "log_softmax"
    targets: ClassVar[tuple[str, ...]] = ("aten.log_softmax.int", "aten._log_softmax.default")

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        y = torch.log_softmax(x[0], self.dim)
        return (y,), (y.exp(),)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return (None if d_y[0] is None else reference.log_backward(saved[0], d_y[0], self.dim),)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        y_dot = None if x_dot[0] is None else reference.log_tangent(saved[0], x_dot[0], self.dim)
        return (y_dot,), (y_dot,)

    def _bend(self, p: Tensor, y_dot: Tensor, d: Tensor) -> Tensor:
        return -(p * y_dot * reference.total(d, self.dim))

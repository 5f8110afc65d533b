"""Elementwise functions of one tensor: activations, powers, exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.activation import reference
from fastmeta.ops.activation.reference import Curve

# PyTorch defines SELU by these two constants.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

CURVES = {
    "aten.relu.default": lambda c: reference.relu(),
    "aten.relu6.default": lambda c: reference.hardtanh(0.0, 6.0),
    "aten.leaky_relu.default": lambda c: reference.leaky_relu(c["negative_slope"]),
    "aten.hardtanh.default": lambda c: reference.hardtanh(c["min_val"], c["max_val"]),
    "aten.tanh.default": lambda c: reference.tanh(),
    "aten.sigmoid.default": lambda c: reference.sigmoid(),
    "aten.silu.default": lambda c: reference.silu(),
    "aten.gelu.default": lambda c: reference.gelu(c["approximate"]),
    "aten.elu.default": lambda c: reference.elu(c["alpha"], c["scale"], c["input_scale"]),
    "aten.selu.default": lambda c: reference.elu(SELU_ALPHA, SELU_SCALE, 1.0),
    "aten.softplus.default": lambda c: reference.softplus(c["beta"], c["threshold"]),
    "aten.abs.default": lambda c: reference.absolute(),
    "aten.exp.default": lambda c: reference.exp(),
    "aten.log.default": lambda c: reference.log(),
    "aten.sqrt.default": lambda c: reference.sqrt(),
    "aten.rsqrt.default": lambda c: reference.rsqrt(),
    "aten.reciprocal.default": lambda c: reference.reciprocal(),
    "aten.square.default": lambda c: reference.power(2),
    "aten.pow.Tensor_Scalar": lambda c: reference.power(c["exponent"]),
    "aten.sin.default": lambda c: reference.sin(),
    "aten.cos.default": lambda c: reference.cos(),
}


@registry.register
class Activation(TaskOp):
    """``y = f(x)`` for every element; saves ``x`` or ``y``. Raises :class:`Unsupported` for integers."""

    name: ClassVar[str] = "activation"
    targets: ClassVar[tuple[str, ...]] = tuple(CURVES)
    saved_names: ClassVar[tuple[str, ...]] = ("input or result",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if not call.inputs[0].dtype.is_floating_point:
            raise Unsupported(f"activation: input must be floating, got {call.inputs[0].dtype}")
        self.curve: Curve = CURVES[str(call.target)](call)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        y, kept = reference.forward(self.curve, x[0])
        return (y,), (kept,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return (self.curve.slope(d_y[0], saved[0]) if need[0] else None,)  # type: ignore[arg-type]

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        y_dot = self.curve.slope(x_dot[0], saved[0])  # type: ignore[arg-type]
        return (y_dot,), () if self.curve.bend is None else (x_dot[0],)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        if not need[0]:
            return (None,)
        x_dot = saved_dot[0] if saved_dot else None
        return (reference.tangent_backward(self.curve, saved[0], x_dot, d_y[0], d_y_dot[0]),)

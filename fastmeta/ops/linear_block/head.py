"""A linear layer and the loss of its results, as one operation with fused kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus
from fastmeta.ops.linear_block.op import LinearBlock

REDUCTIONS = {1: True, 2: False}  # ATen's mean and sum
LOSSES = {"aten.cross_entropy_loss.default": "cross_entropy", "aten.mse_loss.default": "mse"}
MOST_CLASSES = 64  # results of a row, which one program keeps: of more its registers spill


class HeadBlock(TaskOp):
    """Loss ``[T]`` and ``z = x W^T + b`` ``[T, ..., C]`` on ``x [T, ..., in]``, with labels or numbers for targets.

    Cross-entropy of rows ``[T, R, C]``, without class weights, or the squared error; the mean or the sum. A label out
    of range makes its task's loss NaN. Saves ``x`` as rows, the weight, and what triton_head.py keeps.

    Args:
        linear: the call of ``aten.linear``.
        loss: the call that reads its result first, and a target that wants no cotangent.

    Raises:
        Unsupported: no float32, a weight that is no matrix, or another loss.
    """

    name: ClassVar[str] = "head_block"
    backend: str = "triton"
    shares: ClassVar[tuple[str, ...]] = ("weight", "bias")
    saved_names: ClassVar[tuple[str, ...]] = ("input", "weight", "gradient", "probabilities", "row factors")

    def __init__(self, linear: Call, loss: Call) -> None:
        self._affine = LinearBlock(linear, None)
        kind, reduction = LOSSES.get(str(loss.target)), loss["reduction"]
        result = linear.outputs[0]
        if kind is None or reduction not in REDUCTIONS or len(loss.inputs) != 2 or loss.inputs[0].shape != result.shape:
            raise Unsupported("head_block: the loss must be a mean or sum, of cross-entropy or a squared error")
        target, rows = loss.inputs[1], result.shape[:-1]
        wanted = (rows, torch.int64) if kind == "cross_entropy" else (result.shape, torch.float32)
        if (target.shape, target.dtype) != wanted or (kind == "cross_entropy" and len(rows) != 1):
            raise Unsupported(f"head_block: a target must be {wanted[1]} of shape {wanted[0]}")
        if not 0 < self._affine.fan_out <= MOST_CLASSES or not self._affine.rows:
            raise Unsupported(f"head_block: rows of 1 to {MOST_CLASSES} results")
        inputs = (*linear.inputs, dataclasses.replace(target, position=len(linear.inputs)))
        super().__init__(dataclasses.replace(linear, inputs=inputs, outputs=(*loss.outputs, *linear.outputs)))
        labels = (int(loss["ignore_index"]), float(loss["label_smoothing"])) if kind == "cross_entropy" else ()
        self._loss = kind, REDUCTIONS[reduction], *labels

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        """Loss and ``z``."""
        from fastmeta.ops.linear_block import triton_head

        flat, weight, bias, target = self._flat(x[0]), x[1], x[2] if self._affine.has_bias else None, x[-1]
        shape = (flat.shape[0], self._affine.rows, -1) if target.is_floating_point() else (flat.shape[0], -1)
        loss, z, kept = triton_head.forward(triton_head.Loss(*self._loss), flat, weight, bias, target.reshape(shape))
        return (loss, self._shaped(z)), (flat, weight, *kept)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        """Cotangents of the input, the weight and the bias: one launch, where no results have cotangents."""
        x, weight, g, *_ = saved
        d_l, d_z = d_y[0], self._flat(d_y[1])
        if d_z is None and Need.SHARED not in need:
            return self._cotangents(saved, d_l, need)
        d_z = plus(d_z, _times(d_l, g))
        return *self._affine.backward((x, weight, g), (d_z,), need[:-1]), None

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        """Tangents of loss and ``z``."""
        from fastmeta.ops.linear_block import triton_head

        x, weight, *kept = saved
        dots = self._flat(x_dot[0]), x_dot[1], x_dot[2] if self._affine.has_bias else None
        if all(dot is None for dot in dots):
            return (None, None), (None, None, None)
        found = triton_head.tangent(triton_head.Loss(*self._loss), triton_head.Kept(*kept), x, weight, *dots)
        loss_dot, z_dot, g_dot = found
        return (loss_dot, self._shaped(z_dot)), (dots[0], dots[1], g_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        """Tangents of the cotangents, likewise."""
        (x, weight, g, *_), (x_dot, weight_dot, g_dot) = saved, saved_dot
        (d_l, d_l_dot), d_z, d_z_dot = (d_y[0], d_y_dot[0]), self._flat(d_y[1]), self._flat(d_y_dot[1])
        if d_z is None and d_z_dot is None and Need.SHARED not in need:
            dots = d_l_dot, g_dot, x_dot, weight_dot
            return self._cotangents(saved, d_l, need, *dots, tangent=True)
        d_z = plus(d_z, _times(d_l, g))
        d_z_dot = plus(d_z_dot, plus(_times(d_l_dot, g), _times(d_l, g_dot)))
        saved_there, dot_there = (x, weight, g), (x_dot, weight_dot, None)
        return *self._affine.tangent_backward(saved_there, dot_there, (d_z,), (d_z_dot,), need[:-1]), None

    def flops(self) -> int:
        """Of the product."""
        return self._affine.flops()

    def _cotangents(
        self,
        saved: tuple[Any, ...],
        d_l: Tensor | None,
        need: Sequence[Need],
        d_l_dot: Tensor | None = None,
        *dots: Tensor | None,
        tangent: bool = False,
    ) -> Tensors:
        """Those of the input, the weight and the bias, or their tangents, where the loss alone has a cotangent."""
        from fastmeta.ops.linear_block import triton

        x, weight, g, *_ = saved
        of_x, of_weight, bias = bool(need[0]), Need.TASK in need[1:], self._affine.has_bias
        if not (of_x or of_weight) or (d_l is None and d_l_dot is None):
            return (None,) * len(need)
        given = triton.LOSS, g, d_l, x, weight, d_l_dot
        found = triton.cotangents(*given, *dots, tangent=tangent, of_x=of_x, of_weight=of_weight, bias=bias)
        d_x = None if found.x is None else found.x.view(found.x.shape[0], *self._affine.x_shape)
        results = (d_x, found.weight, found.bias) if bias else (d_x, found.weight)
        return *(d if want else None for d, want in zip(results, need, strict=False)), None

    def _flat(self, value: Any) -> Any:
        return value if value is None else value.reshape(value.shape[0], self._affine.rows, value.shape[-1])

    def _shaped(self, z: Tensor) -> Tensor:
        return z.view(z.shape[0], *self._affine.y_shape)


def _times(d_l: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """A cotangent of each task's loss, ``[T]``, times ``[T, R, C]``."""
    return None if d_l is None or rows is None else d_l.view(-1, 1, 1) * rows

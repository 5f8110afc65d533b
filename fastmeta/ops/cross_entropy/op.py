"""Softmax cross-entropy of class labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.cross_entropy import reference
from fastmeta.ops.cross_entropy.reference import NONE, Kept

CLASSES = 4096  # that a GPU's kernels keep in registers


@registry.register
class CrossEntropy(TaskOp):
    """Cross-entropy of logits ``[T, N, C, ...]`` and labels ``[T, N, ...]``, with class weights and label smoothing.

    Saves the gradient, the probabilities and a factor of each row.

    Raises:
        Unsupported: targets are probabilities.
        ValueError: in ``forward`` on a CPU, a label outside ``[0, C)`` that is not ``ignore_index``; on a GPU it makes
            the loss NaN, or fails an assertion of PyTorch's where there are no kernels.
    """

    name: ClassVar[str] = "cross_entropy"
    targets: ClassVar[tuple[str, ...]] = ("aten.cross_entropy_loss.default",)
    fixed: ClassVar[tuple[str, ...]] = ("weight",)
    saved_names: ClassVar[tuple[str, ...]] = ("gradient", "probabilities", "row factors")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        z, target = call["self"], call["target"]
        if target.dtype.is_floating_point:
            raise Unsupported("cross_entropy: targets are probabilities")
        if not z.dtype.is_floating_point or (call["weight"] is not None and call["weight"].dtype != z.dtype):
            raise Unsupported("cross_entropy: logits and class weights must have one floating dtype")
        self.shape, self.rows_shape = tuple(z.shape), tuple(target.shape)
        self.axis = 0 if len(self.shape) == 1 else 1  # of the classes, in one task's logits
        self.classes, self.rows = self.shape[self.axis], math.prod(self.rows_shape)
        self.is_rows = len(self.shape) == 2
        self.reduction: int = call["reduction"]
        self.ignored, self.smoothing = int(call["ignore_index"]), float(call["label_smoothing"])
        self.weight = call.position("weight")

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        self.backend = "triton" if self._on_gpu(x[0]) else "reference"
        if self.backend == "triton":
            from fastmeta.ops.cross_entropy import triton

            rows, given = self._rows(x[0]), x[1].reshape(-1, self.rows)
            loss, kept = triton.forward(rows, given, self.ignored, self.reduction, self.smoothing)
            return (loss,), tuple(kept)
        labels, mask = self._labels(x[1].reshape(-1, self.rows))
        weight = None if self.weight is None else x[self.weight]
        z = self._rows(x[0])
        loss, kept = reference.forward(z, labels, mask, weight, self.reduction, self.smoothing)
        return (self._loss(loss),), tuple(kept)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None or not need[0]:
            return self._only(None)
        return self._only(reference.backward(Kept(*saved), self._flat(d_y[0])))

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if x_dot[0] is None:
            return (None,), (None,)
        if self._on_gpu(x_dot[0]):
            from fastmeta.ops.cross_entropy import triton

            loss_dot, moved = triton.tangent(Kept(*saved), self._rows(x_dot[0]))
            return (loss_dot,), (moved,)
        loss_dot, moved = reference.tangent(Kept(*saved), self._rows(x_dot[0]), self.reduction)
        return (self._loss(loss_dot),), (moved,)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        if not need[0]:
            return self._only(None)
        d, d_dot = (None if v is None else self._flat(v) for v in (d_y[0], d_y_dot[0]))
        return self._only(reference.tangent_backward(Kept(*saved), saved_dot[0], d, d_dot))

    def _on_gpu(self, z: Tensor) -> bool:
        """Whether Triton's kernels run: for the mean or the sum over rows, without class weights."""
        fits = self.reduction != NONE and self.weight is None and 0 < self.classes <= CLASSES and z.is_cuda
        return fits and not triton_support.missing_reason(z.device, z.dtype)

    def _labels(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels within range, and which rows count (``None`` for all of them)."""
        if labels.device.type != "cpu":  # reading a label back would stall the device, whose gather checks for itself
            mask = labels != self.ignored
            return torch.where(mask, labels, 0), mask
        if labels.numel() == 0:
            return labels, None
        low, high = (int(v) for v in torch.aminmax(labels))
        inside = low >= 0 and high < self.classes
        if inside and not 0 <= self.ignored < self.classes:
            return labels, None
        mask = labels != self.ignored
        if not inside:
            counted = labels[mask]
            wrong = counted[(counted < 0) | (counted >= self.classes)]
            if wrong.numel():
                raise ValueError(
                    f"cross_entropy: labels must be in [0, {self.classes}), got {int(wrong[0])}; relabel each task's "
                    f"classes from 0, or mark rows to leave out with ignore_index={self.ignored}"
                )
            labels = torch.where(mask, labels, 0)
        return labels, mask

    def _rows(self, z: Tensor) -> Tensor:
        if self.is_rows:
            return z
        return z.movedim(self.axis + 1, -1).reshape(z.shape[0], self.rows, self.classes)

    def _only(self, rows: Tensor | None) -> Tensors:
        rest: Tensors = (None,) * (len(self.call.inputs) - 1)
        if rows is None or self.is_rows:
            return rows, *rest
        moved = rows.reshape(rows.shape[0], *self.rows_shape, self.classes)
        return moved.movedim(-1, self.axis + 1), *rest

    def _loss(self, value: Tensor) -> Tensor:
        return value.reshape(value.shape[0], *self.rows_shape) if self.reduction == NONE else value

    def _flat(self, d: Tensor) -> Tensor:
        return d.reshape(d.shape[0], self.rows) if self.reduction == NONE else d

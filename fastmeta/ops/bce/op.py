"""``aten.binary_cross_entropy_with_logits``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.bce import reference

MEAN, SUM = 1, 2  # ATen's codes; 0 is no reduction


@registry.register
class BCEWithLogits(TaskOp):
    """Binary cross-entropy on logits, differentiable in logits and targets; saves what it is given."""

    name: ClassVar[str] = "bce_with_logits"
    targets: ClassVar[tuple[str, ...]] = ("aten.binary_cross_entropy_with_logits.default",)
    fixed: ClassVar[tuple[str, ...]] = ("weight", "pos_weight")
    saved_names: ClassVar[tuple[str, ...]] = ("logits", "targets", "weights", "positive weights")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        shape = call["self"].shape
        if call["target"].shape != shape or len({i.dtype for i in call.inputs}) > 1:
            raise Unsupported("bce_with_logits: logits and targets must have one shape and dtype")
        self.shape, self.rank = shape, len(shape)
        self.reduction = call["reduction"]
        self.count = max(math.prod(shape), 1)
        self.weight, self.positive = call.position("weight"), call.position("pos_weight")

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        w, q = self._aligned(x, self.weight), self._aligned(x, self.positive)
        losses = reference.loss(x[0], x[1], w, q)
        return (self._reduce(losses),), (x[0], x[1], w, q)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        z, y, w, q = saved
        d = self._spread(d_y[0], z)
        if d is None:
            return (None,) * len(self.call.inputs)
        d_z = d * reference.by_logit(z, y, w, q) if need[0] else None
        d_target = d * reference.by_target(z, w, q) if need[1] else None
        return self._results(d_z, d_target)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        z, y, w, q = saved
        by_logit = None if x_dot[0] is None else reference.by_logit(z, y, w, q) * x_dot[0]
        by_target = None if x_dot[1] is None else reference.by_target(z, w, q) * x_dot[1]
        total = plus(by_logit, by_target)
        return (None if total is None else self._reduce(total),), (x_dot[0], x_dot[1])

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (z, y, w, q), (z_dot, target_dot) = saved, saved_dot
        d_z, d_target, *_ = self.backward(saved, d_y_dot, need)
        d = self._spread(d_y[0], z)
        if d is not None and z_dot is not None:
            if need[0]:
                d_z = plus(d_z, d * reference.by_logit_twice(z, y, w, q) * z_dot)
            if need[1]:
                d_target = plus(d_target, d * reference.by_logit_and_target(z, w, q) * z_dot)
        if d is not None and target_dot is not None and need[0]:
            d_z = plus(d_z, d * reference.by_logit_and_target(z, w, q) * target_dot)
        return self._results(d_z, d_target)

    def _aligned(self, x: Sequence[Tensor], position: int | None) -> Tensor | None:
        """A weight ``[T, ...]`` with axes of one behind T, so that it broadcasts as one task's does."""
        if position is None:
            return None
        value = x[position]
        return value.reshape(value.shape[0], *[1] * (self.rank + 1 - value.dim()), *value.shape[1:])

    def _reduce(self, losses: Tensor) -> Tensor:
        if self.reduction not in (MEAN, SUM):
            return losses
        total = losses.flatten(1).sum(1)
        return total / self.count if self.reduction == MEAN else total

    def _spread(self, d: Tensor | None, like: Tensor) -> Tensor | None:
        """The cotangent of every element's loss."""
        if d is None or self.reduction not in (MEAN, SUM):
            return d
        d = d / self.count if self.reduction == MEAN else d
        return d.reshape(-1, *[1] * self.rank).expand(like.shape)

    def _results(self, d_z: Tensor | None, d_target: Tensor | None) -> Tensors:
        return (d_z, d_target, *[None] * (len(self.call.inputs) - 2))

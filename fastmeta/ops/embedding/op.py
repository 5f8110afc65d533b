"""``aten.embedding``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.embedding import reference


@registry.register
class Embedding(TaskOp):
    """``y = W[i]``; saves the indices. The row of ``padding_idx`` gets no gradient, as in PyTorch."""

    name: ClassVar[str] = "embedding"
    targets: ClassVar[tuple[str, ...]] = ("aten.embedding.default",)
    shares: ClassVar[tuple[str, ...]] = ("weight",)
    saved_names: ClassVar[tuple[str, ...]] = ("indices",)

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if call["scale_grad_by_freq"]:
            raise Unsupported("embedding: scale_grad_by_freq")
        self.size, self.width = call["weight"].shape
        self.count = math.prod(call["indices"].shape)
        self.padding = int(call["padding_idx"])

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        indices = x[1].reshape(x[1].shape[0], self.count)
        return (self._shaped(reference.rows(x[0], indices)),), (indices,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None or not need[0]:
            return None, None
        d = d_y[0].reshape(d_y[0].shape[0], self.count, self.width)
        shared = need[0] is Need.SHARED
        return reference.table_cotangent(d, saved[0], self.size, self.padding, shared), None

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if x_dot[0] is None:
            return (None,), ()
        return (self._shaped(reference.rows(x_dot[0], saved[0])),), ()

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: Tensors, d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self.backward(saved, d_y_dot, need)

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows.reshape(rows.shape[0], *self.call.outputs[0].shape)

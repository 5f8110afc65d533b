"""``aten.embedding``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.embedding import reference


@registry.register
class Embedding(TaskOp):
    """``y = W[i]``; saves the indices. The row of ``padding_idx`` gets no gradient, as in PyTorch.

    Raises:
        Unsupported: ``scale_grad_by_freq``.
        IndexError: in ``forward`` on a CPU, an index outside ``[0, V)``; on a GPU it makes its row NaN, or fails an
            assertion of PyTorch's where there are no kernels.
    """

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
        self.backend = "triton" if self._on_gpu(x[0]) else "reference"
        indices = x[1].reshape(x[1].shape[0], self.count)
        return (self._rows(x[0], indices),), (indices,)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None or not need[0]:
            return None, None
        d = d_y[0].reshape(d_y[0].shape[0], self.count, self.width)
        rest = saved[0], self.size, self.padding, need[0] is Need.SHARED
        if self._on_gpu(d):
            from fastmeta.ops.embedding import triton

            return triton.table_cotangent(d, *rest), None
        return reference.table_cotangent(d, *rest), None

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        if x_dot[0] is None:
            return (None,), ()
        return (self._rows(x_dot[0], saved[0]),), ()

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: Tensors, d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self.backward(saved, d_y_dot, need)

    def _on_gpu(self, x: Tensor) -> bool:
        """Whether Triton's kernels run."""
        return x.is_cuda and not triton_support.missing_reason(x.device, x.dtype)

    def _rows(self, table: Tensor, indices: Tensor) -> Tensor:
        if self._on_gpu(table):
            from fastmeta.ops.embedding import triton

            rows = triton.rows(table, indices)
        else:
            rows = reference.rows(table, indices)
        return rows.reshape(rows.shape[0], *self.call.outputs[0].shape)

"""Sums and means over axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, registry
from fastmeta.ops.reduction import reference


@registry.register
class Reduction(TaskOp):
    """``sum`` or ``mean`` over all axes of a task or some of them; nothing is saved.

    Raises :class:`Unsupported` where input and result are not of one floating dtype.
    """

    name: ClassVar[str] = "reduction"
    targets: ClassVar[tuple[str, ...]] = (
        "aten.sum.default",
        "aten.sum.dim_IntList",
        "aten.mean.default",
        "aten.mean.dim",
    )

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        source, result = call.inputs[0], call.outputs[0]
        if source.dtype != result.dtype or not result.dtype.is_floating_point:
            raise Unsupported(f"reduction: of {source.dtype} to {result.dtype}")
        self.shape, self.result = tuple(source.shape), tuple(result.shape)
        rank = len(self.shape)
        dims = {d % rank for d in call.arguments.get("dim") or range(rank)} if rank else set()
        self.kept = tuple(1 if i in dims else n for i, n in enumerate(self.shape))
        self.axes = tuple(d + 1 for d in sorted(dims))
        self.mean = "mean" in call.target._schema.name
        self.scale = 1.0 / max(1, math.prod(self.shape[d] for d in dims)) if self.mean else 1.0

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        return (reference.apply(x[0], self.axes, self.result, self.mean),), ()

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        return self._transpose(d_y[0], need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        return self.forward(x_dot)  # type: ignore[arg-type]

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        return self._transpose(d_y_dot[0], need)

    def _transpose(self, d: Tensor | None, need: Sequence[Need]) -> Tensors:
        if d is None or not need[0]:
            return (None,)
        return (reference.transpose(d, self.kept, self.shape, self.scale),)

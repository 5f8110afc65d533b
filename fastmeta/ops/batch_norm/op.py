"""Batch norm as export writes it: by the set's statistics, with or without running ones, or by running statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.batch_norm import reference
from fastmeta.ops.batch_norm.reference import Normalised, Tangent


@registry.register
class BatchNorm(TaskOp):
    """Batch norm over samples and positions of every task on its own.

    In training mode each task's set is normalised by its own statistics, and the new running statistics of each task
    are returned beside the result; who writes them, and whether, is the caller's choice. In evaluation mode the running
    statistics normalise. Saves the input, normalised already or with its mean, the reciprocal deviation and the scale.
    """

    name: ClassVar[str] = "batch_norm"
    targets: ClassVar[tuple[str, ...]] = (
        "aten._native_batch_norm_legit_functional.default",
        "aten._native_batch_norm_legit.no_stats",
        "aten._native_batch_norm_legit_no_training.default",
    )
    fixed: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")
    saved_names: ClassVar[tuple[str, ...]] = ("input or normalised", "mean", "reciprocal deviation", "scale")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if len({i.dtype for i in call.inputs}) > 1:
            raise Unsupported("batch_norm: input, parameters and statistics must have one dtype")
        self.uses_batch_statistics = bool(call.arguments.get("training", False))
        self.shape = call["input"].shape
        self.channels = self.shape[1]
        self.count = math.prod(self.shape) // max(self.channels, 1)
        self.axes = len(self.shape)
        self.scale, self.shift = call.position("weight"), call.position("bias")
        statistics = ("running_mean", "running_var")
        self.running = [call.position(n) for n in statistics if call.arguments.get(n) is not None]
        if not self.uses_batch_statistics and not self.running:
            raise Unsupported("batch_norm: evaluation without running statistics")
        self.momentum, self.eps = float(call["momentum"]), float(call["eps"])

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        z = self._rows(x[0])
        c, b = self._at(x, self.scale), self._at(x, self.shift)
        old = [x[p] for p in self.running if p is not None]
        if self.uses_batch_statistics:
            given = (old[0], old[1]) if old else None
            y, normal, mu, new = reference.batch_forward(z, c, b, given, self.momentum, self.eps)
            extra = [mu, normal.r, *(new or ())]
        else:
            y, normal = reference.fixed_forward(z, c, b, old[0], old[1], self.eps)
            extra = [z.new_empty((z.shape[0], 0)), z.new_empty((z.shape[0], 0))]
        return (self._shaped(y), *extra), (*normal, c)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        if d_y[0] is None:
            return self._results(None, None, None, need)
        x, c = Normalised(*saved[:3]), saved[3]
        d = self._rows(d_y[0])
        if not self.uses_batch_statistics and not any(need[1:]):
            return self._results(self._rescale(d, x, c), None, None, need)
        m1, m2 = reference.means(d, x)
        d_z = None
        if need[0]:
            d_z = reference.input_cotangent(x, c, d, m1, m2) if self.uses_batch_statistics else self._rescale(d, x, c)
        return self._results(d_z, m2, m1, need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        x, c = Normalised(*saved[:3]), saved[3]
        c_dot, b_dot = self._at(x_dot, self.scale), self._at(x_dot, self.shift)
        move = None
        if x_dot[0] is not None:
            z_dot = self._rows(x_dot[0])
            zero = torch.zeros_like(x.r)
            move = Tangent(z_dot, *(reference.means(z_dot, x) if self.uses_batch_statistics else (zero, zero)))
        y_dot = reference.tangent(x, c, move, c_dot, b_dot)
        nothing = [None] * (len(self.call.outputs) - 1)
        kept = (None, None, None) if move is None else tuple(move)
        return (None if y_dot is None else self._shaped(y_dot), *nothing), (*kept, c_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        x, c, c_dot = Normalised(*saved[:3]), saved[3], saved_dot[3]
        move = None if saved_dot[0] is None else Tangent(*saved_dot[:3])
        d, d_dot = self._with_means(x, d_y[0]), self._with_means(x, d_y_dot[0])
        p = None if d is None or move is None else reference.turned_mean(x, d[0], move, d[1], d[2])
        d_z_dot = None
        if need[0]:
            if self.uses_batch_statistics:
                d_z_dot = reference.input_cotangent_dot(x, c, d, d_dot, move, p, c_dot)
            else:
                d_z_dot = plus(
                    None if d_dot is None else self._rescale(d_dot[0], x, c),
                    None if d is None or c_dot is None else self._rescale(d[0], x, c_dot),
                )
        m1_dot, m2_dot = (None, None) if d_dot is None else d_dot[1:]
        return self._results(d_z_dot, plus(m2_dot, p), m1_dot, need)

    @staticmethod
    def _rescale(d: Tensor, x: Normalised, c: Tensor | None) -> Tensor:
        return reference.affine(d, x.r if c is None else c * x.r, None)

    def _with_means(self, x: Normalised, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        if value is None:
            return None
        d = self._rows(value)
        return d, *reference.means(d, x)

    def _at(self, values: Sequence[Tensor | None], position: int | None) -> Tensor | None:
        return None if position is None else values[position]

    def _rows(self, value: Tensor) -> Tensor:
        """``[T, N, C, ...]`` as ``[T, M, C]``: a view where channels lie last in memory."""
        last = value.movedim(2, -1) if self.axes > 2 else value
        return last.reshape(value.shape[0], self.count, self.channels)

    def _shaped(self, rows: Tensor) -> Tensor:
        value = rows.view(rows.shape[0], self.shape[0], *self.shape[2:], self.channels)
        return value.movedim(-1, 2) if self.axes > 2 else value

    def _results(self, d_z: Tensor | None, m2: Tensor | None, m1: Tensor | None, need: Sequence[Need]) -> Tensors:
        """Cotangents from ``d_z`` and the means of which ``d_c`` and ``d_b`` are the sums."""
        results: list[Tensor | None] = [None] * len(self.call.inputs)
        results[0] = None if d_z is None else self._shaped(d_z)
        for position, mean in ((self.scale, m2), (self.shift, m1)):
            if position is not None and need[position] and mean is not None:
                results[position] = mean * self.count
        return tuple(results)

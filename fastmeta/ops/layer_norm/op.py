"""``aten.layer_norm``: every sample normalised over its trailing axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastmeta.core import triton_support
from fastmeta.core.task_op import Call, Need, TaskOp, Tensors, Unsupported, plus, registry
from fastmeta.ops.layer_norm import reference

WIDEST = 8192  # features of a row that a kernel keeps in registers


@registry.register
class LayerNorm(TaskOp):
    """Layer norm with or without scale and shift; saves the normalised input, the reciprocal deviation, the scale."""

    name: ClassVar[str] = "layer_norm"
    targets: ClassVar[tuple[str, ...]] = ("aten.layer_norm.default",)
    saved_names: ClassVar[tuple[str, ...]] = ("normalised", "reciprocal deviation", "scale")

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        if len({i.dtype for i in call.inputs}) > 1:
            raise Unsupported("layer_norm: input, weight and bias must have one dtype")
        self.shape = call["input"].shape
        self.features = math.prod(call["normalized_shape"])
        self.rows = math.prod(self.shape) // max(self.features, 1)
        self.parameter_shape = tuple(call["normalized_shape"])
        self.scale, self.shift = call.position("weight"), call.position("bias")
        self.eps = float(call["eps"])

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        c, b = self._parameter(x, self.scale), self._parameter(x, self.shift)
        if self._on_gpu(x[0]):
            from fastmeta.ops.layer_norm import triton

            self.backend = "triton"
            y, normalised, r = triton.forward(self._rows(x[0]), c, b, self.eps)
        else:
            normalised, r = reference.normalise(self._rows(x[0]), self.eps)
            y = reference.affine(normalised, c, b)
        return (y.reshape(y.shape[0], *self.shape),), (normalised, r, c)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        x, r, c = saved
        d = self._rows(d_y[0])
        if self._on_gpu(x):
            return self._by_kernels(saved, (None, None, None), None, d, need)
        d_x = reference.affine(d, c, None)
        d_c = (d * x).sum(1) if self.scale is not None and need[self.scale] else None
        return self._results(reference.project(d_x, x, r) if need[0] else None, d_c, d, need)

    def tangent(self, saved: tuple[Any, ...], x_dot: Tensors) -> tuple[Tensors, Tensors]:
        x, r, c = saved
        c_dot, b_dot = self._parameter(x_dot, self.scale), self._parameter(x_dot, self.shift)
        y_dot: Tensor | None
        normalised_dot = turn = None
        if self._on_gpu(x) and any(dot is not None for dot in x_dot):
            from fastmeta.ops.layer_norm import triton

            on_gpu, *kept = triton.tangent(x, r, c, self._rows(x_dot[0]), c_dot, b_dot)
            return (on_gpu.reshape(x.shape[0], *self.shape),), (*kept, c_dot)
        if x_dot[0] is not None:
            z_dot = self._rows(x_dot[0])
            normalised_dot, turn = reference.project(z_dot, x, r), reference.mean(z_dot * x) * r
        y_dot = None if normalised_dot is None else reference.affine(normalised_dot, c, None)
        if c_dot is not None:
            y_dot = plus(y_dot, reference.affine(x, c_dot, None))
        if b_dot is not None:
            y_dot = plus(y_dot, b_dot.unsqueeze(1).expand(x.shape))
        y_dot = None if y_dot is None else y_dot.reshape(x.shape[0], *self.shape)
        return (y_dot,), (normalised_dot, turn, c_dot)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        (x, r, c), (normalised_dot, turn, c_dot) = saved, saved_dot
        d, d_dot = self._rows(d_y[0]), self._rows(d_y_dot[0])
        if self._on_gpu(x):
            return self._by_kernels(saved, saved_dot, d, d_dot, need)
        d_z_dot = d_c_dot = None
        if need[0]:
            d_x_dot = None if d_dot is None else reference.affine(d_dot, c, None)
            if d is not None and c_dot is not None:
                d_x_dot = plus(d_x_dot, reference.affine(d, c_dot, None))
            if d is not None and normalised_dot is not None:
                d_x = reference.affine(d, c, None)
                d_z_dot = reference.input_cotangent_dot(x, r, normalised_dot, turn, d_x, d_x_dot)
            elif d_x_dot is not None:
                d_z_dot = reference.project(d_x_dot, x, r)
        if self.scale is not None and need[self.scale]:
            d_c_dot = None if d_dot is None else (d_dot * x).sum(1)
            if d is not None and normalised_dot is not None:
                d_c_dot = plus(d_c_dot, (d * normalised_dot).sum(1))
        return self._results(d_z_dot, d_c_dot, d_dot, need)

    def _by_kernels(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d: Any, d_dot: Any, need: Sequence[Need]
    ) -> Tensors:
        """Tangents of the cotangents; without tangents, the cotangents for one ``d_dot``."""
        from fastmeta.ops.layer_norm import triton

        (x, r, c), (x_dot, turn, c_dot) = saved, saved_dot
        d = None if x_dot is None and c_dot is None else d
        results: list[Tensor | None] = [None] * len(self.call.inputs)
        if need[0] and not (d is None and d_dot is None):
            d_z = triton.input_cotangent(x, r, c, d, d_dot, x_dot, turn, c_dot)
            results[0] = d_z.reshape(x.shape[0], *self.shape)
        d = None if x_dot is None else d
        want_c = self.scale is not None and bool(need[self.scale]) and not (d is None and d_dot is None)
        want_b = self.shift is not None and bool(need[self.shift]) and d_dot is not None
        cotangents = triton.parameter_cotangents(x, d, d_dot, x_dot, want_c, want_b)
        for position, value in zip((self.scale, self.shift), cotangents, strict=True):
            if position is not None and value is not None:
                results[position] = value.reshape(x.shape[0], *self.parameter_shape)
        return tuple(results)

    def _on_gpu(self, x: Tensor) -> bool:
        """Whether Triton's kernels run."""
        fits = 0 < self.features <= WIDEST and x.is_cuda
        return fits and not triton_support.missing_reason(x.device, x.dtype)

    def _rows(self, value: Any) -> Any:
        return None if value is None else value.reshape(value.shape[0], self.rows, self.features)

    def _parameter(self, values: Sequence[Tensor | None], position: int | None) -> Tensor | None:
        value = None if position is None else values[position]
        return None if value is None else value.reshape(value.shape[0], self.features)

    def _results(self, d_z: Tensor | None, d_c: Tensor | None, d: Tensor | None, need: Sequence[Need]) -> Tensors:
        results: list[Tensor | None] = [None] * len(self.call.inputs)
        results[0] = None if d_z is None else d_z.reshape(d_z.shape[0], *self.shape)
        if self.scale is not None and d_c is not None:
            results[self.scale] = d_c.reshape(d_c.shape[0], *self.parameter_shape)
        if self.shift is not None and need[self.shift] and d is not None:
            results[self.shift] = d.sum(1).reshape(d.shape[0], *self.parameter_shape)
        return tuple(results)

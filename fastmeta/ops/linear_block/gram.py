"""A linear layer that reads the data alone and keeps its weight as factors, with the activation that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.curves import BENT, BY_INPUT, Curve
from fastmeta.core.low_rank import Factor, LowRank
from fastmeta.core.product import linear, products
from fastmeta.core.task_op import Need, Tensors
from fastmeta.ops.linear_block.op import LinearBlock

FACTORS = 2  # that a kernel takes: of the rows of the support and of the query set
# Rows on either side of a Gram matrix up to which a library's batched product is a single tile a task, over long sums.
ONE_TILE = 32


class GramBlock(LinearBlock):
    """``y = f(x W^T + b)`` on data ``x [T, ..., in]``, with ``W = W_0 + sum of s D^T x'`` of such data.

    A step multiplies Gram matrices ``x x'^T`` with ``D``, eq. (11), each made once a meta-step. The weight's cotangent
    goes as factors (``Need.FACTORS``), the input has neither tangent nor cotangent.
    """

    name = "gram_block"

    def forward(self, x: Sequence[Any]) -> tuple[Tensors, Tensors]:
        """``y``; saves ``x`` as rows, the weight, and what ``f'`` is a function of."""
        from fastmeta.ops.linear_block import triton_gram

        flat, by_input = self._flat(x[0]), self.curve.kind in BY_INPUT
        base, pairs = _parts(x[1], flat)
        y, z = triton_gram.rows(self.curve, base, pairs, x[2] if self.has_bias else None, keep=by_input)
        return (self._shaped(y, self.y_shape),), (flat, x[1], z if by_input else y)

    def backward(self, saved: tuple[Any, ...], d_y: Tensors, need: Sequence[Need]) -> Tensors:
        """Factors of ``d_W``, and ``d_b``."""
        from fastmeta.ops.linear_block import triton_gram

        x, _, s = saved
        d_z, d_b = triton_gram.summed(self.curve, s, self._flat(d_y[0]), bias=self._by_task(need))
        return self._cotangents(d_z, d_b, x, need)

    def tangent(self, saved: tuple[Any, ...], x_dot: tuple[Any, ...]) -> tuple[Tensors, Tensors]:
        """``y_dot``; saves ``z_dot`` where the activation bends."""
        from fastmeta.ops.linear_block import triton_gram

        flat, _, s = saved
        bent = self.curve.kind in BENT
        base, pairs = (None, ()) if x_dot[1] is None else _parts(x_dot[1], flat)
        bias_dot = x_dot[2] if self.has_bias else None
        if base is None and not pairs:
            if bias_dot is None:
                return (None,), (None,)
            base = torch.zeros_like(s)
        y_dot, z_dot = triton_gram.rows(self.curve, base, pairs, bias_dot, s, keep=bent)
        return (self._shaped(y_dot, self.y_shape),), (z_dot,)

    def tangent_backward(
        self, saved: tuple[Any, ...], saved_dot: tuple[Any, ...], d_y: Tensors, d_y_dot: Tensors, need: Sequence[Need]
    ) -> Tensors:
        """Factors of ``d_W_dot``, and ``d_b_dot``."""
        from fastmeta.ops.linear_block import triton_gram

        x, _, s = saved
        d, d_dot = self._flat(d_y[0]), self._flat(d_y_dot[0])
        bias = self._by_task(need)
        d_z_dot, d_b = triton_gram.summed(self.curve, s, d, d_dot, saved_dot[0], tangent=True, bias=bias)
        return self._cotangents(d_z_dot, d_b, x, need)

    def _by_task(self, need: Sequence[Need]) -> bool:
        return self.has_bias and need[2] is Need.TASK

    def _cotangents(self, d_z: Tensor, d_b: Tensor | None, x: Tensor, need: Sequence[Need]) -> Tensors:
        weight: Any = LowRank(None, (Factor(d_z, x),)) if need[1] else None
        if not self.has_bias:
            return None, weight
        return None, weight, d_z.sum((0, 1)) if need[2] is Need.SHARED else d_b


def _parts(weight: Any, x: Tensor) -> tuple[Tensor | None, tuple[Any, ...]]:
    """``x W^T`` as what is given whole, ``[T, R, O]``, and the pairs that are still to be multiplied."""
    from fastmeta.ops.linear_block import triton
    from fastmeta.ops.linear_block.triton_gram import Pair

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        small = max(a.shape[1], b.shape[1]) <= ONE_TILE
        return triton.rows(Curve("identity"), a, b)[0] if small else products(a, b.mT)

    if not isinstance(weight, LowRank):  # before the first step
        return linear(x.flatten(0, 1), weight).unflatten(0, x.shape[:2]), ()
    numbers = all(not isinstance(f.scale, Tensor) or f.scale.dim() == 0 for f in weight.factors)
    coefficient = isinstance(weight.coefficient, float) and weight.coefficient == 1
    if weight.met is None or weight.own is not None or not (numbers and coefficient) or len(weight.factors) > FACTORS:
        return weight.of_rows(x), ()
    met = weight.met
    pairs = tuple(Pair(met.rows(x, f.right, multiply), f.left, f.scale) for f in weight.factors)
    return None if weight.shared is None else met.shared(x, weight.shared), pairs

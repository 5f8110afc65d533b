"""Elementwise arithmetic with broadcasting: sums, products, quotients.

    backward          d_a     = (dy/da) d_y
    tangent           y_dot   = (dy/da) a_dot + (dy/db) b_dot
    tangent_backward  d_a_dot = (dy/da) d_y_dot + (dy/da)_dot d_y

Tensors carry the task axis first and are aligned by :class:`Fit`, so that the other axes broadcast as they stand. What
broadcasting repeated, a cotangent sums over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fit:
    """How one task's ``shape`` broadcasts to ``result``."""

    shape: tuple[int, ...]
    result: tuple[int, ...]
    aligned: tuple[int, ...]
    repeated: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], result: tuple[int, ...]) -> Fit:
        """Work out which axes broadcasting adds or repeats."""
        aligned = (1,) * (len(result) - len(shape)) + shape
        return cls(shape, result, aligned, tuple(i + 1 for i, n in enumerate(result) if aligned[i] != n))

    def spread(self, x: Tensor) -> Tensor:
        """``[T, *shape] -> [T, *aligned]``, which broadcasts to the result."""
        return x if self.aligned == self.shape else x.reshape(x.shape[0], *self.aligned)

    def fill(self, x: Tensor) -> Tensor:
        """``[T, *shape] -> [T, *result]``."""
        return self.spread(x).expand(-1, *self.result) if self.repeated else self.spread(x)

    def gather(self, d: Tensor) -> Tensor:
        """Transpose of :meth:`fill`: sum over what was repeated."""
        if self.repeated:
            d = d.sum(self.repeated, keepdim=True)
        return d if self.aligned == self.shape else d.reshape(d.shape[0], *self.shape)


def combine(terms: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """``sum_i factors_i terms_i`` of one or two terms."""
    first, p = terms[0], factors[0]
    if len(terms) == 1:
        return first if p == 1 else first * p
    return torch.add(first if p == 1 else first * p, terms[1], alpha=factors[1])


def quotient_slopes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``y = a / b``: ``dy/da = 1 / b`` and ``dy/db = -a / b^2``."""
    inverse = b.reciprocal()
    return inverse, -(a * inverse) * inverse


def quotient_slopes_dot(
    inverse: Tensor, slope: Tensor, a_dot: Tensor | None, b_dot: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Tangents of :func:`quotient_slopes`: ``-b_dot / b^2`` and ``-a_dot / b^2 + 2 a b_dot / b^3``."""
    square = inverse * inverse
    first = None if b_dot is None else -square * b_dot
    second = None if a_dot is None else -square * a_dot
    if b_dot is not None:
        moved = -2 * slope * inverse * b_dot
        second = moved if second is None else second + moved
    return first, second

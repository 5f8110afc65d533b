"""Matrices of tasks that are one shared matrix and products of few rows (docs/maths.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.core.product import linear, product


@dataclass(frozen=True)
class LowRank:
    """One matrix a task, ``W_t = shared + sum over factors of left_t^T right_t``; never formed.

    Attributes:
        shared: ``[out, in]``; ``None`` for zero.
        factors: pairs of ``left [T, r, out]`` and ``right [T, r, in]``.
    """

    shared: Tensor | None
    factors: tuple[tuple[Tensor, Tensor], ...] = ()

    def of_rows(self, x: Tensor) -> Tensor:
        """``x W^T``, eq. (10): ``[T, R, in] -> [T, R, out]``."""
        y = None if self.shared is None else linear(x.flatten(0, 1), self.shared).unflatten(0, x.shape[:2])
        for left, right in self.factors:
            y = _add_product(y, torch.bmm(x, right.mT), left)
        return _require(y)

    def of_cotangents(self, d: Tensor) -> Tensor:
        """``d W``, eq. (11): ``[T, R, out] -> [T, R, in]``."""
        y = None if self.shared is None else product(d.flatten(0, 1), self.shared).unflatten(0, d.shape[:2])
        for left, right in self.factors:
            y = _add_product(y, torch.bmm(d, left.mT), right)
        return _require(y)

    def plus(self, other: LowRank, scale: Tensor | float = 1.0) -> LowRank:
        """``self + scale * other``, where ``other`` has no shared part; rows seen before take no further factor."""
        factors = list(self.factors)
        for left, right in other.factors:
            scaled = left * scale
            same = [i for i, (_, seen) in enumerate(factors) if _same(seen, right)]
            if same:
                factors[same[0]] = factors[same[0]][0] + scaled, right
            else:
                factors.append((scaled, right))
        return LowRank(self.shared, tuple(factors))

    def inner(self, other: LowRank) -> Tensor:
        """``[T]``: ``<self_t, other_t>`` of two without shared part."""
        total = None
        for left, right in self.factors:
            for other_left, other_right in other.factors:
                part = (torch.bmm(left, other_left.mT) * torch.bmm(right, other_right.mT)).sum((1, 2))
                total = part if total is None else total + part
        return _require(total)

    def over_tasks(self) -> Tensor:
        """``[out, in]``: the sum over tasks of one without shared part, one product over the stacked rows."""
        total = None
        for left, right in self.factors:
            a, b = left.flatten(0, 1).t(), right.flatten(0, 1)
            total = product(a, b) if total is None else total.add_(product(a, b))
        return _require(total)

    def formed(self) -> Tensor:
        """``[T, out, in]``."""
        total = None
        for left, right in self.factors:
            total = torch.bmm(left.mT, right) if total is None else total.baddbmm_(left.mT, right)
        formed = _require(total)
        return formed if self.shared is None else formed.add_(self.shared)

    @property
    def rank(self) -> int:
        """The rank of what is added to the shared matrix, at the most."""
        return sum(left.shape[1] for left, _ in self.factors)


def _add_product(y: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if y is None else y.baddbmm_(a, b)


def _require(y: Tensor | None) -> Tensor:
    if y is None:
        raise RuntimeError("low rank: a matrix must have a shared part or factors, got neither")
    return y


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements of the same memory."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())

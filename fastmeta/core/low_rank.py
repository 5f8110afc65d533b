"""Matrices of tasks that are one shared matrix and products of few rows (docs/maths.md, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.product import linear, product, products


class Factor(NamedTuple):
    """``scale left_t^T right_t`` of every task.

    Attributes:
        left, right: ``[T, r, out]`` and ``[T, r, in]``.
        scale: a number or ``[]``: rows are used again and again with other scales, and never copied for that.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | float = 1.0


@dataclass(frozen=True)
class LowRank:
    """One matrix a task, ``W_t = shared + sum over factors of scale left_t^T right_t``; never formed.

    Attributes:
        shared: ``[out, in]``; ``None`` for zero.
        factors: products of few rows.
    """

    shared: Tensor | None
    factors: tuple[Factor, ...] = ()

    def of_rows(self, x: Tensor) -> Tensor:
        """``x W^T``, eq. (10): ``[T, R, in] -> [T, R, out]``."""
        y = None if self.shared is None else linear(x.flatten(0, 1), self.shared).unflatten(0, x.shape[:2])
        for left, right, scale in self.factors:
            y = products(_scaled(products(x, right.mT), scale), left, y)
        return _require(y)

    def of_cotangents(self, d: Tensor) -> Tensor:
        """``d W``, eq. (11): ``[T, R, out] -> [T, R, in]``."""
        y = None if self.shared is None else product(d.flatten(0, 1), self.shared).unflatten(0, d.shape[:2])
        for left, right, scale in self.factors:
            y = products(_scaled(products(d, left.mT), scale), right, y)
        return _require(y)

    def plus(self, other: LowRank, scale: Tensor | float = 1.0) -> LowRank:
        """``self + scale * other``, where ``other`` has no shared part; rows seen before take no further factor."""
        factors = list(self.factors)
        for factor in other.factors:
            added = factor._replace(scale=factor.scale * scale)
            same = [i for i, seen in enumerate(factors) if _same(seen.right, factor.right)]
            if same:
                left = _scaled(factors[same[0]].left, factors[same[0]].scale, copy=True)
                factors[same[0]] = Factor(left.add_(_scaled(added.left, added.scale, copy=True)), factor.right)
            else:
                factors.append(added)
        return LowRank(self.shared, tuple(factors))

    def inner(self, other: LowRank) -> Tensor:
        """``[T]``: ``<self_t, other_t>`` of two without shared part."""
        total = None
        for left, right, scale in self.factors:
            for other_left, other_right, other_scale in other.factors:
                part = (torch.bmm(left, other_left.mT) * torch.bmm(right, other_right.mT)).sum((1, 2))
                part = part * (scale * other_scale)
                total = part if total is None else total + part
        return _require(total)

    def over_tasks(self) -> Tensor:
        """``[out, in]``: the sum over tasks of one without shared part, one product over the stacked rows."""
        total = None
        for left, right, scale in self.factors:
            part = _scaled(product(left.flatten(0, 1).t(), right.flatten(0, 1)), scale)
            total = part if total is None else total.add_(part)
        return _require(total)

    def formed(self) -> Tensor:
        """``[T, out, in]``."""
        total = None
        for left, right, scale in self.factors:
            part = _scaled(torch.bmm(left.mT, right), scale)
            total = part if total is None else total.add_(part)
        formed = _require(total)
        return formed if self.shared is None else formed.add_(self.shared)

    @property
    def rank(self) -> int:
        """The rank of what is added to the shared matrix, at the most."""
        return sum(factor.left.shape[1] for factor in self.factors)


def _scaled(y: Tensor, scale: Tensor | float, *, copy: bool = False) -> Tensor:
    """``scale y``, in place unless it must be a copy."""
    if isinstance(scale, float) and scale == 1:
        return y.clone() if copy else y
    return y * scale if copy else y.mul_(scale)


def _require(y: Tensor | None) -> Tensor:
    if y is None:
        raise RuntimeError("low rank: a matrix must have a shared part or factors, got neither")
    return y


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements of the same memory."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())

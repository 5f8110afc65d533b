"""Matrices of tasks that are one shared matrix and products of few rows (docs/maths.md, section 3).

Where the rows grow too many, they are added up to a matrix of each task's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from fastmeta.core.product import linear, product, products

Scale = Tensor | float  # a number, ``[]``, one number a row ``[out, 1]``, or one a column ``[1, in]``


class Factor(NamedTuple):
    """``scale * left_t^T right_t`` of every task.

    Attributes:
        left, right: ``[T, r, out]`` and ``[T, r, in]``.
        scale: rows are used again and again with other scales, and never copied for that.
    """

    left: Tensor
    right: Tensor
    scale: Scale = 1.0

    def rows_scaled(self) -> Tensor:
        """A copy of the left rows with the scale in it, which is none a column."""
        if _is_one(self.scale):
            return self.left.clone()
        return self.left * (self.scale.mT if _by_row(self.scale) else self.scale)

    def rows_with(self, other: Factor) -> Tensor:
        """The left rows of the sum of both, which have their right rows in common and no scale a column."""
        rows = self.left if _is_one(self.scale) else self.rows_scaled()
        scale = other.scale.mT if _by_row(other.scale) else other.scale
        if isinstance(scale, Tensor):
            return torch.addcmul(rows, other.left, scale)
        return torch.add(rows, other.left, alpha=scale)

    def applied(self) -> tuple[Tensor, Tensor, Scale]:
        """The same with nothing but a number for its scale."""
        if _by_row(self.scale):
            return self.rows_scaled(), self.right, 1.0
        if _by_column(self.scale):
            return self.left, self.right * self.scale, 1.0
        return self


class Own(NamedTuple):
    """``scale * matrix_t`` of every task, ``[T, out, in]``: what factors were added up to."""

    matrix: Tensor
    scale: Scale = 1.0

    def scaled(self) -> Tensor:
        """A copy with the scale in it."""
        return self.matrix.clone() if _is_one(self.scale) else self.matrix * self.scale


class Met:
    """Products of rows that are the same at every inner step, those of the data: each is made once.

    What is returned is not to be written.
    """

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}  # with the operands, so that they stay in place

    def rows(self, x: Tensor, right: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """``x_t right_t^T``: ``[T, R, in]`` and ``[T, r, in]`` to ``[T, R, r]``, by ``multiply`` if it is given."""
        key = _place(x), _place(right)
        if key not in self._found:
            turned = self._found.get(key[::-1])
            if turned is not None:
                found = turned[2].mT
            else:
                found = products(x, right.mT) if multiply is None else multiply(x, right)
            self._found[key] = x, right, found
        return self._found[key][2]

    def shared(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``x_t W^T``: ``[T, R, in]`` and ``[out, in]`` to ``[T, R, out]``."""
        key = _place(x), _place(matrix)
        if key not in self._found:
            self._found[key] = x, matrix, linear(x.flatten(0, 1), matrix).unflatten(0, x.shape[:2])
        return self._found[key][2]


@dataclass(frozen=True)
class LowRank:
    """One matrix a task, ``W_t = coefficient * shared + own_t + sum over factors of scale * left_t^T right_t``.

    The coefficient and the scales of one matrix are numbers or one a row, or they are numbers or one a column.

    Attributes:
        shared: ``[out, in]``; ``None`` for zero.
        factors: products of few rows, which are not formed while their rank is within the limit.
        coefficient: of the shared matrix.
        own: what was formed, the shared matrix with it.
        limit: the rank from which on factors are added up; ``None`` for never.
        met: where all rows that the matrix meets are the data's, what they gave.
    """

    shared: Tensor | None
    factors: tuple[Factor, ...] = ()
    coefficient: Scale = 1.0
    own: Own | None = None
    limit: int | None = None
    met: Met | None = None

    def of_rows(self, x: Tensor) -> Tensor:
        """``x W^T``, eq. (10): ``[T, R, in] -> [T, R, out]``."""
        y = None
        if self.shared is not None:
            c = self.coefficient
            if self.met is None or _by_column(c):
                y = linear((x * c if _by_column(c) else x).flatten(0, 1), self.shared).unflatten(0, x.shape[:2])
            else:
                y = self.met.shared(x, self.shared).clone()
            y = y if _by_column(c) else _scaled(y, c.mT if _by_row(c) else c)
        if self.own is not None:
            c = self.own.scale
            part = products(x * c if _by_column(c) else x, self.own.matrix.mT)
            part = part if _by_column(c) else _scaled(part, c.mT if _by_row(c) else c)
            y = part if y is None else y.add_(part)
        for factor in self.factors:
            left, right, scale = factor.applied()
            if self.met is None or right is not factor.right:
                y = products(_scaled(products(x, right.mT), scale), left, y)
            else:
                met = self.met.rows(x, right)
                y = products(met if _is_one(scale) else met * scale, left, y)
        return _require(y)

    def of_cotangents(self, d: Tensor) -> Tensor:
        """``d W``, eq. (11): ``[T, R, out] -> [T, R, in]``."""
        y = None
        if self.shared is not None:
            c = self.coefficient
            y = product((d * c.mT if _by_row(c) else d).flatten(0, 1), self.shared).unflatten(0, d.shape[:2])
            y = y if _by_row(c) else _scaled(y, c)
        if self.own is not None:
            c = self.own.scale
            part = products(d * c.mT if _by_row(c) else d, self.own.matrix)
            part = part if _by_row(c) else _scaled(part, c)
            y = part if y is None else y.add_(part)
        for factor in self.factors:
            left, right, scale = factor.applied()
            y = products(_scaled(products(d, left.mT), scale), right, y)
        return _require(y)

    def plus(self, other: LowRank, scale: Scale = 1.0) -> LowRank:
        """``self + scale * other``, of which shared parts are multiples of one matrix; nothing is added twice.

        A product that is there already gets another scale, and one whose right rows are there another left factor,
        unless one of the two has a scale a column.
        """
        factors = list(self.factors)
        for factor in other.factors:
            added = factor._replace(scale=_both(factor.scale, scale))
            alike = [i for i, seen in enumerate(factors) if _same(seen.right, factor.right)]
            twice = [i for i in alike if _same(factors[i].left, factor.left)]
            folds = [] if _by_column(added.scale) else [i for i in alike if not _by_column(factors[i].scale)]
            if twice:
                factors[twice[0]] = added._replace(scale=factors[twice[0]].scale + added.scale)
            elif folds:
                factors[folds[0]] = Factor(factors[folds[0]].rows_with(added), factor.right)
            else:
                factors.append(added)
        shared, coefficient, own = self.shared, self.coefficient, self.own
        if other.shared is not None:
            more = _both(other.coefficient, scale)
            shared, coefficient = other.shared, more if shared is None else coefficient + more
        if other.own is not None:
            added_own = other.own._replace(scale=_both(other.own.scale, scale))
            own = added_own if own is None else Own(own.scaled().add_(added_own.scaled()))
        limit = other.limit if self.limit is None else self.limit
        met = other.met if self.met is None else self.met
        return LowRank(shared, tuple(factors), coefficient, own, limit, met).within_limit()

    def times(self, scale: Scale) -> LowRank:
        """``scale * self``."""
        return replace(
            self,
            factors=tuple(factor._replace(scale=_both(factor.scale, scale)) for factor in self.factors),
            coefficient=self.coefficient if self.shared is None else _both(self.coefficient, scale),
            own=None if self.own is None else self.own._replace(scale=_both(self.own.scale, scale)),
        )

    def within_limit(self) -> LowRank:
        """The same, added up to a matrix of each task's own where the rank is beyond the limit."""
        if self.limit is None or not self.factors or (self.own is None and self.rank <= self.limit):
            return self
        return LowRank(None, own=Own(self.formed()), limit=self.limit, met=self.met)

    def minus_(self, other: LowRank) -> LowRank:
        """``self - other``, where ``other`` has no shared part; what this has of its own is overwritten."""
        if self.own is None or not _is_one(self.own.scale):
            return self.plus(other, -1.0)
        if other.own is not None:
            self.own.matrix.sub_(other.own.scaled())
        for factor in other.factors:
            left, right, c = factor.applied()
            _add_products(self.own.matrix, left, right, -1.0 * c)
        return self

    def inner(self, other: LowRank, shape: tuple[int, ...] = ()) -> Tensor | None:
        """The elements' products, summed over tasks and to ``shape``, which is ``[]``, ``[out, 1]`` or ``[1, in]``.

        ``other`` has no shared part. ``None`` where one of the two is zero.
        """
        total = None
        if self.shared is not None and (other.factors or other.own is not None):
            total = (self.shared * self.coefficient * other.over_tasks()).sum_to_size(shape)
        if self.own is not None or other.own is not None:
            if any(one.own is None and not one.factors for one in (self, other)):
                return total
            rest = replace(self, shared=None).formed().mul_(other.formed()).sum(0).sum_to_size(shape)
            return rest if total is None else total + rest
        for left, right, scale in self.factors:
            for other_left, other_right, other_scale in other.factors:
                both = scale * other_scale
                if _by_row(both) or (shape and shape[0] > 1):
                    part = (left * torch.bmm(torch.bmm(right, other_right.mT), other_left)).sum((0, 1)).unsqueeze(1)
                elif _by_column(both) or (shape and shape[1] > 1):
                    part = (right * torch.bmm(torch.bmm(left, other_left.mT), other_right)).sum((0, 1)).unsqueeze(0)
                else:
                    part = (torch.bmm(left, other_left.mT) * torch.bmm(right, other_right.mT)).sum()
                part = (part * both).sum_to_size(shape)
                total = part if total is None else total + part
        return total

    def over_tasks(self, onto: Tensor | None = None) -> Tensor:
        """``[out, in]``: the sum over tasks of one without shared part, one product over the stacked rows.

        Args:
            onto: ``[out, in]``, what it is added to; it is overwritten.
        """
        total = onto
        if self.own is not None:
            part = _scaled(self.own.matrix.sum(0), self.own.scale)
            total = part if total is None else total.add_(part)
        for factor in self.factors:
            left, right, scale = factor.applied()
            rows = left.flatten(0, 1) if _is_one(scale) else left.flatten(0, 1) * scale
            stacked = rows.t().unsqueeze(0), right.flatten(0, 1).unsqueeze(0)
            total = products(*stacked, None if total is None else total.unsqueeze(0)).squeeze(0)
        return _require(total)

    def formed(self) -> Tensor:
        """``[T, out, in]``."""
        total = None if self.own is None else self.own.scaled()
        for factor in self.factors:
            left, right, scale = factor.applied()
            if total is None:
                total = _scaled(products(left.mT, right), scale)
            else:
                _add_products(total, left, right, scale)
        formed = _require(total)
        return formed if self.shared is None else formed.add_(self.shared * self.coefficient)

    @property
    def rank(self) -> int:
        """The rank of what is added to the shared matrix, at the most."""
        return sum(factor.left.shape[1] for factor in self.factors)


def rank_limit(out: int, fan_in: int) -> int:
    """The rank at which factors take as many operations and as much memory as a matrix ``[out, fan_in]``."""
    return out * fan_in // (out + fan_in)


def _is_one(scale: Scale) -> bool:
    return isinstance(scale, float) and scale == 1


def _both(a: Scale, b: Scale) -> Scale:
    """Their product, without a kernel for what is no factor."""
    if _is_one(a):
        return b
    return a if _is_one(b) else a * b


def _by_row(scale: Scale) -> TypeGuard[Tensor]:
    return isinstance(scale, Tensor) and scale.dim() == 2 and scale.shape[0] > 1


def _by_column(scale: Scale) -> TypeGuard[Tensor]:
    return isinstance(scale, Tensor) and scale.dim() == 2 and scale.shape[1] > 1


def _scaled(y: Tensor, scale: Scale) -> Tensor:
    """``scale * y``, in place."""
    return y if _is_one(scale) else y.mul_(scale)


def _add_products(total: Tensor, left: Tensor, right: Tensor, scale: Scale) -> None:
    """``total_t += scale * left_t^T right_t``, in place; the scale is a number or ``[]``."""
    if isinstance(scale, Tensor):
        total.baddbmm_((left * scale).mT, right)
    else:
        total.baddbmm_(left.mT, right, alpha=scale)


def _require(y: Tensor | None) -> Tensor:
    if y is None:
        raise RuntimeError("low rank: a matrix must have a shared part or factors, got neither")
    return y


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same elements of the same memory."""
    return a is b or _place(a) == _place(b)

"""Linear rearrangements ``y = L x``: reshape, permute, expand, take a part, join.

Being linear, each is its own tangent, and its transpose is both remaining maps:

    forward           y       = L x
    tangent           y_dot   = L x_dot
    backward          d_x     = L^T d_y
    tangent_backward  d_x_dot = L^T d_y_dot

Tensors carry the task axis first; ``shape`` and ``dim`` here speak of one task's value, with ``dim >= 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Maybe = Sequence[Tensor | None]


@dataclass(frozen=True)
class Rule:
    """A linear map: ``apply`` takes all inputs; ``transpose`` takes cotangents of which not all are ``None``."""

    apply: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    transpose: Callable[[Maybe], tuple[Tensor | None, ...]]


def single(apply: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> Rule:
    """A rule of one input and one output."""
    return Rule(lambda x: (apply(x[0]),), lambda d: (None if d[0] is None else transpose(d[0]),))


def identity() -> Rule:
    """``y = x``: a copy, which a program of pure functions has no use for."""
    return single(lambda x: x, lambda d: d)


def detach() -> Rule:
    """``y = x`` for values, zero for tangents and cotangents: the operation leaves those out."""
    return Rule(lambda x: (x[0],), lambda d: (None,))


def cast(inner: torch.dtype, outer: torch.dtype) -> Rule:
    """Change of dtype."""
    return single(lambda x: x.to(outer), lambda d: d.to(inner))


def reshape(shape: Shape, result: Shape) -> Rule:
    """The same elements in another shape."""
    return single(lambda x: x.reshape(x.shape[0], *result), lambda d: d.reshape(d.shape[0], *shape))


def permute(order: Sequence[int]) -> Rule:
    """``y[i_order] = x[i]``."""
    there = (0, *(p + 1 for p in order))
    back = tuple(there.index(p) for p in range(len(there)))
    return single(lambda x: x.permute(there), lambda d: d.permute(back))


def expand(shape: Shape, result: Shape) -> Rule:
    """Repeat along axes of size one and along new leading axes; the transpose sums over them."""
    aligned = (1,) * (len(result) - len(shape)) + shape
    repeated = [i + 1 for i, (a, b) in enumerate(zip(aligned, result, strict=True)) if a != b]

    def apply(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *aligned).expand(-1, *result)

    def transpose(d: Tensor) -> Tensor:
        return (d.sum(repeated, keepdim=True) if repeated else d).reshape(d.shape[0], *shape)

    return identity() if shape == result else single(apply, transpose)


def slice_(shape: Shape, dim: int, start: int | None, end: int | None, step: int) -> Rule:
    """Every ``step``-th entry of ``dim`` between ``start`` and ``end``; the transpose puts zeros around it."""
    where = (*(slice(None),) * (dim + 1), slice(start, end, step))
    return single(lambda x: x[where], lambda d: _into_zeros(d, shape, where))


def select(shape: Shape, dim: int, index: int) -> Rule:
    """One entry of ``dim``."""
    where: tuple[slice | int, ...] = (*(slice(None),) * (dim + 1), index)
    return single(lambda x: x[where], lambda d: _into_zeros(d, shape, where))


def flip(dims: Sequence[int]) -> Rule:
    """Reverse the order along ``dims``."""
    axes = [d + 1 for d in dims]
    return single(lambda x: x.flip(axes), lambda d: d.flip(axes))


def pad(amounts: Sequence[int]) -> Rule:
    """A border of zeros (``amounts`` as ``torch.nn.functional.pad`` takes them; negative ones crop)."""
    back = [-a for a in amounts]
    return single(lambda x: torch.constant_pad_nd(x, amounts), lambda d: torch.constant_pad_nd(d, back))


def cat(sizes: Sequence[int], dim: int) -> Rule:
    """Join along ``dim``, where the inputs measure ``sizes``."""

    def transpose(d: Maybe) -> tuple[Tensor | None, ...]:
        return (None,) * len(sizes) if d[0] is None else tuple(d[0].split(list(sizes), dim + 1))

    return Rule(lambda x: (torch.cat(list(x), dim + 1),), transpose)


def stack(count: int, dim: int) -> Rule:
    """Join along a new axis ``dim``."""

    def transpose(d: Maybe) -> tuple[Tensor | None, ...]:
        return (None,) * count if d[0] is None else tuple(d[0].unbind(dim + 1))

    return Rule(lambda x: (torch.stack(list(x), dim + 1),), transpose)


def split(shape: Shape, sizes: Sequence[int], dim: int) -> Rule:
    """Cut ``dim`` into parts of ``sizes``."""

    def transpose(d: Maybe) -> tuple[Tensor | None, ...]:
        like = next(v for v in d if v is not None)

        def zeros(size: int) -> Tensor:
            return like.new_zeros(like.shape[0], *shape[:dim], size, *shape[dim + 1 :])

        return (torch.cat([zeros(n) if v is None else v for v, n in zip(d, sizes, strict=True)], dim + 1),)

    return Rule(lambda x: tuple(x[0].split(list(sizes), dim + 1)), transpose)


def unbind(shape: Shape, dim: int) -> Rule:
    """Every entry of ``dim`` by itself."""

    def transpose(d: Maybe) -> tuple[Tensor | None, ...]:
        like = next(v for v in d if v is not None)
        zero = like.new_zeros(()).expand(like.shape)
        return (torch.stack([zero if v is None else v for v in d], dim + 1),)

    return Rule(lambda x: tuple(x[0].unbind(dim + 1)), transpose)


def broadcast(shapes: Sequence[Shape], result: Shape) -> Rule:
    """Expand every input to one common shape."""
    rules = [expand(shape, result) for shape in shapes]
    return Rule(
        lambda x: tuple(rule.apply([v])[0] for rule, v in zip(rules, x, strict=True)),
        lambda d: tuple(rule.transpose([v])[0] for rule, v in zip(rules, d, strict=True)),
    )


def _into_zeros(d: Tensor, shape: Shape, where: tuple[slice | int, ...]) -> Tensor:
    result = d.new_zeros(d.shape[0], *shape)
    result[where] = d
    return result

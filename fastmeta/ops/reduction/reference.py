"""Sums and means over axes of one task's value: linear, so ``apply`` and ``transpose`` are all four maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def apply(x: Tensor, axes: tuple[int, ...], result: Sequence[int], mean: bool) -> Tensor:
    """``y = sum or mean of x over axes``; axes count the task axis. Returns ``[T, *result]``."""
    if not axes:
        return x
    return (x.mean(axes) if mean else x.sum(axes)).reshape(x.shape[0], *result)


def transpose(d: Tensor, kept: Sequence[int], shape: Sequence[int], scale: float) -> Tensor:
    """``d_x``: the cotangent, scaled, at every entry it was summed from.

    Args:
        d: ``[T, *result]``.
        kept: one task's shape with ones where axes were reduced.
        shape: one task's shape.
        scale: one for a sum, ``1 / n`` for a mean.
    """
    return (d if scale == 1 else d * scale).reshape(d.shape[0], *kept).expand(-1, *shape)

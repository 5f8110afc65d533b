"""What the Triton maps of a block keep, and how operands lie for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmeta.ops.conv_block.geometry import Geometry


@dataclass(frozen=True)
class Saved:
    """What a forward pass keeps, every image with its channels last.

    Attributes:
        x: ``[T, N, H, W, I]``.
        weight, turned: packed for the convolution, ``[T or 1, parts, taps, O, I]``, and for its transpose.
        z: ``[T, N, h, w, O]``; ``None`` unless it is normalised, and where it is computed anew.
        mean, rstd: ``[T, O]``; ``None`` unless ``z`` is normalised.
        scale: ``[T or 1, O]`` or ``None``.
        code, peak: of every window, see ``triton_norm``.
        bias: ``[T or 1, O]`` where ``z`` is computed anew, see ``triton_first``; else ``None``.
        middle, spread: of the patches where ``z`` is computed anew: ``[T, I]``, and sums of their products with
            themselves and of themselves, ``[T, F + 1, F]``; else ``None``.
    """

    x: Tensor
    weight: Tensor
    turned: Tensor
    z: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    scale: Tensor | None = None
    code: Tensor | None = None
    peak: Tensor | None = None
    bias: Tensor | None = None
    middle: Tensor | None = None
    spread: Tensor | None = None


@dataclass(frozen=True)
class SavedDot:
    """What a tangent map keeps: tangents of the input and of the packed weight, and of what is normalised.

    Attributes:
        x_dot, weight_dot, turned_dot: like ``x`` and the packed weights; ``None`` for zero.
        z_dot: like ``z``; ``None`` where it is. ``peak_dot`` and ``moves`` are ``None`` unless ``z`` is normalised.
        peak_dot: of every window.
        moves: ``[T, 2, O]``, sums of ``z_dot`` and of ``x z_dot``.
        scale_dot: ``[T, O]`` or ``None``.
    """

    x_dot: Tensor | None = None
    weight_dot: Tensor | None = None
    turned_dot: Tensor | None = None
    z_dot: Tensor | None = None
    peak_dot: Tensor | None = None
    moves: Tensor | None = None
    scale_dot: Tensor | None = None


def channels_last(images: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` as ``[T, N, H, W, C]``, dense."""
    return images.movedim(2, -1).contiguous()


def channel_rows(value: Tensor | None) -> Tensor | None:
    """Parameters of channels, with or without task axis, as ``[T or 1, C]`` that lie one after another."""
    if value is None:
        return None
    rows = value if value.dim() == 2 else value.unsqueeze(0)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def stride(value: Tensor | None) -> int:
    """Elements from one task's value to the next; 0 where tasks share it."""
    return 0 if value is None or value.shape[0] == 1 else value.stride(0)


def of_windows(like: Tensor, g: Geometry, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised value for every window and channel."""
    return like.new_empty((like.shape[0], g.images, *g.pool_size, g.out), dtype=dtype or like.dtype)


def sizes(g: Geometry) -> tuple[int, ...]:
    """Images, and sizes of the convolution's result and the block's, as kernels take them."""
    return (g.images, *g.conv_size, *g.pool_size)

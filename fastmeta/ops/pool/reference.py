"""Pooling of plain images ``[B, C, H, W]``: linear maps once the maximum's positions are known.

Max pooling finds positions in its forward map alone; the other three gather or scatter there, so one tie or one
rounding can never send primal and tangent to different pixels. Values lie channels-last in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixels(value: Tensor) -> Tensor:
    """``[B, C, H, W]`` as ``[B, H * W, C]``: a view where channels lie last in memory."""
    return value.movedim(1, -1).flatten(1, 2)


def image(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """``[B, H * W, C]`` as ``[B, C, H, W]``."""
    return rows.unflatten(1, size).movedim(-1, 1)


def gather(value: Tensor, positions: Tensor) -> Tensor:
    """Values at ``positions [B, h * w, C]`` of an image, as rows."""
    return pixels(value).gather(1, positions)


def scatter(rows: Tensor, positions: Tensor, size: tuple[int, ...], *, overlap: bool) -> Tensor:
    """Transpose of :func:`gather`: an image that holds ``rows`` at ``positions`` and zero elsewhere.

    Args:
        rows: ``[B, h * w, C]``.
        positions: likewise.
        size: H and W of the image.
        overlap: whether windows share pixels, so that values have to be added.
    """
    result = rows.new_zeros(rows.shape[0], size[0] * size[1], rows.shape[2])
    result = result.scatter_add_(1, positions, rows) if overlap else result.scatter_(1, positions, rows)
    return image(result, size)


def adaptive_matrix(size: int, bins: int, like: Tensor) -> Tensor:
    """``[bins, size]``: row i averages pixels ``floor(i size / bins)`` to ``ceil((i + 1) size / bins)``."""
    matrix = torch.zeros(bins, size, dtype=like.dtype, device=like.device)
    for i in range(bins):
        start, stop = i * size // bins, -((-(i + 1) * size) // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix

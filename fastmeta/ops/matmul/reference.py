"""``y = a b`` on trailing matrices: bilinear, so every map is a sum of products."""

from __future__ import annotations

import torch
from torch import Tensor


def align(value: Tensor, axes: int) -> Tensor:
    """Insert axes of one behind the task axis until there are ``axes``: batch axes then broadcast as one task's do."""
    missing = axes - value.dim()
    return value if missing <= 0 else value.reshape(value.shape[0], *[1] * missing, *value.shape[1:])


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` with batch axes broadcast task by task."""
    axes = max(a.dim(), b.dim())
    return torch.matmul(align(a, axes), align(b, axes))


def reduce(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum a cotangent ``[T, ...]`` over the axes along which one task's ``shape`` was broadcast."""
    extra = value.dim() - 1 - len(shape)
    if extra:
        value = value.sum(tuple(range(1, 1 + extra)))
    axes = [i + 1 for i, size in enumerate(shape) if size == 1 and value.shape[i + 1] != 1]
    return value.sum(axes, keepdim=True) if axes else value

"""``y = W[i]``: linear in the table, so the other three maps are its own and its transpose.

Shapes: table ``[V, D]`` or ``[T, V, D]``, indices ``[T, R]``, rows ``[T, R, D]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rows(table: Tensor, indices: Tensor) -> Tensor:
    """``W[i]``."""
    if table.dim() == 2:
        return F.embedding(indices, table)
    return F.embedding(_own(indices, table.shape[1]), table.reshape(-1, table.shape[2]))


def table_cotangent(d: Tensor, indices: Tensor, size: int, padding: int, shared: bool) -> Tensor:
    """Sum of the rows ``d`` at each index, ``[T, V, D]``, or over tasks too, ``[V, D]``; ``padding`` gets none."""
    if padding >= 0:
        d = d.masked_fill((indices == padding).unsqueeze(-1), 0)
    tasks, width = d.shape[0], d.shape[-1]
    if shared:
        return d.new_zeros(size, width).index_add_(0, indices.flatten(), d.reshape(-1, width))
    flat = d.new_zeros(tasks * size, width)
    return flat.index_add_(0, _own(indices, size).flatten(), d.reshape(-1, width)).view(tasks, size, width)


def _own(indices: Tensor, size: int) -> Tensor:
    """Indices into the tables of all tasks laid end to end; one out of range must not name another task's row."""
    outside = (indices < 0) | (indices >= size)
    first = size * torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
    return (indices + first).masked_fill_(outside, -1)

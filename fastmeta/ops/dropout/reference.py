"""Inverted dropout, ``y = m x`` with ``m = keep / (1 - p)``: linear in ``x`` once the mask is drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(x: Tensor, p: float) -> Tensor:
    """A mask like ``x``: ``1 / (1 - p)`` with probability ``1 - p``, else 0; independent over tasks and elements."""
    if p >= 1.0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format).bernoulli_(1.0 - p).div_(1.0 - p)


def scale(x: Tensor, mask: Tensor) -> Tensor:
    """``m x``: the forward map, and each of the other three, of its own argument."""
    return x * mask

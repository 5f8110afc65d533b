"""A model that float arithmetic can hardly tell from another: what rounding alone does to its gradients."""

from __future__ import annotations

import copy

import torch
from torch import nn


def nudged(model: nn.Module, seed: int, *, ulps: float) -> nn.Module:
    """A copy of ``model`` whose weights are ``w (1 + ulps * eps * u)``, ``u`` uniform in [-1, 1).

    Args:
        model: any module; ``eps`` is that of each parameter's dtype.
        seed: of ``u``.
        ulps: how far a weight may move, in units of its last place.
    """
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moved.parameters():
            moves = 2 * torch.rand(p.shape, generator=generator).to(p.device) - 1  # the same on every device
            p.mul_(1 + ulps * torch.finfo(p.dtype).eps * moves)
    return moved

"""Inner gradients clipped to a norm, each task's by itself, and the adjoint of that: eq. (28) of docs/maths.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


def norms(g: Sequence[Any]) -> Tensor:
    """The 2-norm of each task's gradient over all parameters, ``[T]``, of ``[T, *shape]`` each."""
    return torch.stack([d.flatten(1).square().sum(1) for d in g]).sum(0).sqrt()


def clipped(g: Sequence[Any], most: float) -> list[Any]:
    """``g min(1, c / (|g| + eps))``."""
    scale = (most / (norms(g) + EPS)).clamp(max=1)
    return [d * scale.view(-1, *[1] * (d.dim() - 1)) for d in g]


def clipped_adjoint(u: Tensor, g: Tensor, most: float) -> Tensor:
    """Cotangent of ``g`` from that of what it was clipped to, ``[T, P]`` each."""
    norm = norms([g]).unsqueeze(1)
    scale = most / (norm + EPS)
    along = (u * g).sum(1, keepdim=True) * scale / ((norm + EPS) * norm)
    return torch.where(scale < 1, scale * u - along * g, u)

"""Functions as modules, a flattening, a learned scale; freezing and thawing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Lambda(nn.Module):
    """A function as a module.

    Args:
        lmb: the function.
    """

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """Inputs ``[N, ...]`` as ``[N, -1]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as ``[N, -1]``."""
        return x.reshape(x.size(0), -1)


class Scale(nn.Module):
    """``x * alpha`` with a learned ``alpha``.

    Args:
        shape: alpha's shape; ``[1]`` by default.
        alpha: what its elements start from.
    """

    def __init__(self, shape: int | tuple[int, ...] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        sizes = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(*sizes) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        """``x * alpha``."""
        return x * self.alpha


def freeze(module: nn.Module) -> nn.Module:
    """Cut every parameter from its graph and let it require no grad, in place; the module is returned."""
    for p in module.parameters():
        p.detach_().requires_grad_(False)
    return module


def unfreeze(module: nn.Module) -> nn.Module:
    """Let every parameter require grad, in place; the module is returned."""
    for p in module.parameters():
        p.requires_grad_(True)
    return module

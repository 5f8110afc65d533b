"""Copies of parameters and walks through nested containers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def copied(tensor: Tensor, device: torch.device | None, safe_copy: bool = True) -> Tensor:
    """``tensor`` outside its graph, requiring grad where it did; the same memory unless ``safe_copy``."""
    value = tensor.detach().clone() if safe_copy else tensor.detach()
    value = value if device is None else value.to(device)
    return value.requires_grad_(tensor.requires_grad)


def get_func_params(module: nn.Module, device: torch.device | None = None, safe_copy: bool = True) -> list[Tensor]:
    """The parameters of ``module`` outside its graph, each requiring grad where the original does.

    Args:
        module: any module.
        device: where to put them; where they are by default.
        safe_copy: copy their memory rather than share it.
    """
    return [copied(p, device, safe_copy) for p in module.parameters()]


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dicts, lists, tuples and sets, in order."""
    if isinstance(x, dict):
        x = list(x.values())
    return [leaf for part in x for leaf in flatten(part)] if isinstance(x, (list, tuple, set)) else [x]


def mapped(fn: Callable[[Any], Any], x: Any) -> Any:
    """``x`` with ``fn`` of every leaf in its place."""
    if isinstance(x, dict):
        return {key: mapped(fn, value) for key, value in x.items()}
    if isinstance(x, (list, tuple, set)):
        return type(x)(mapped(fn, value) for value in x)
    return fn(x)

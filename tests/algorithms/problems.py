"""Small float64 models and tasks that the algorithms are tested on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastmeta as fm

T, WAYS, FEATURES = 3, 3, 4
EXACT = 1e-9


def network(features: int = FEATURES, outputs: int = WAYS) -> nn.Sequential:
    """A smooth network, so that second derivatives are all there."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 6), nn.Tanh(), nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, outputs)).double()


def labelled(seed: int = 1, shots: int = 2, queries: int = 4, features: int = FEATURES) -> fm.TaskBatch:
    """Tasks with every class in the support set."""
    generator = torch.Generator().manual_seed(seed)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(WAYS).repeat(n).expand(T, -1).contiguous()
        return torch.randn(T, WAYS * n, features, dtype=torch.float64, generator=generator), labels

    return fm.TaskBatch(batch(shots), batch(queries))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """What ``backward`` has left, by name; zero where nothing came."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}

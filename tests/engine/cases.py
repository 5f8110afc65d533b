"""Models and tasks the engine is tested on, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.learner.models import conv4

T = 3
WAYS = 3


class Residual(nn.Module):
    """A convolution, a residual block with batch norm, global average pool, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.stem(x)))
        h = F.leaky_relu(h + self.norm2(self.block(h)), 0.1)
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class Transformer(nn.Module):
    """Token and position embeddings, one encoder layer, mean pool, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(5, 8) * 0.1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, WAYS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids) + self.position).mean(1))


class Recurrent(nn.Module):
    """An LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, batch_first=True)
        self.head = nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Unusual(nn.Module):
    """Operations that only the generic op covers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sin(self.inner(x)) * torch.exp(-self.scale).cumsum(0)
        h = torch.einsum("ni,nj->nij", h, h).diagonal(dim1=1, dim2=2) + torch.logsumexp(h, 1, keepdim=True)
        return self.head(torch.special.erf(h))


@dataclass(frozen=True)
class Case:
    """A model and how one task's samples look."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]  # number of samples -> [T, N, ...]
    targets: Callable[[int], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    lr: float = 0.1

    def tasks(self, dtype: torch.dtype, support: int = 5, query: int = 6) -> tuple[Any, Any]:
        """Support and query set of T tasks."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return tuple((cast(self.inputs(n)), cast(self.targets(n))) for n in (support, query))  # type: ignore[return-value]


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Samples of independent normal numbers."""
    return lambda n: torch.randn(T, n, *shape, dtype=torch.float64)


def labels(n: int) -> Tensor:
    """Random classes."""
    return torch.randint(WAYS, (T, n))


def mlp(activation: nn.Module) -> Callable[[], nn.Module]:
    """A small network with one activation."""
    return lambda: nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 7), activation, nn.Linear(7, WAYS))


CASES = {
    "mlp-relu": Case(mlp(nn.ReLU()), normal(4), labels),
    "mlp-tanh-mse": Case(mlp(nn.Tanh()), normal(4), normal(WAYS), F.mse_loss),
    "mlp-layernorm-bce": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, WAYS)),
        normal(4),
        lambda n: torch.rand(T, n, WAYS, dtype=torch.float64),
        F.binary_cross_entropy_with_logits,
    ),
    "conv4": Case(lambda: conv4(1, WAYS, filters=4, image_size=16), normal(1, 16, 16), labels),
    "residual": Case(Residual, normal(2, 6, 6), labels),
    "transformer": Case(Transformer, lambda n: torch.randint(11, (T, n, 5)), labels),
    "lstm": Case(Recurrent, normal(4, 2), labels),
    "generic": Case(Unusual, normal(4), labels),
}

"""Networks with what a patched module has to keep: ties, buffers, recurrence, nesting, slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Mixed(nn.Module):
    """Batch norm, an LSTM, a tied weight, a slice of a Sequential, a parameter that is ``None``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.recurrent = nn.LSTM(6, 5, batch_first=True)
        self.rest = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.rest[0].weight
        self.scale = nn.Parameter(torch.ones(2))
        self.register_parameter("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.recurrent(torch.tanh(self.norm(self.first(x)))[:, None])
        h = self.rest[:2](self.tied(h[:, 0]))
        return self.scale * (h @ self.rest[2].weight.T + self.rest[2].bias)


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double()


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches(number: int, width: int = 4, out: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (width, out)) for _ in range(number)
    ]


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert (ours - theirs).norm() <= tolerance * theirs.norm().clamp_min(1e-30)


def slope(f: Callable[[float], float], h: float = 1e-5) -> float:
    """The derivative of ``f`` at 0, by differences of the fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def flat(tensors: list[Tensor | None]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors if t is not None])


def two_steps_with_momentum(model: nn.Module, support: Any, query: Any) -> tuple[Tensor | None, ...]:
    """Meta-gradient of two steps of SGD at 0.1 with momentum 0.5 and dampening 0.3, written out."""
    start = dict(model.named_parameters())
    p, buffer = start, {}
    for _ in range(2):
        loss = squared(torch.func.functional_call(model, p, support[0]), support[1])
        gradients = torch.autograd.grad(loss, list(p.values()), create_graph=True, allow_unused=True)
        moved = {}
        for (name, value), g in zip(p.items(), gradients, strict=True):
            if g is not None:
                buffer[name] = 0.5 * buffer[name] + 0.7 * g if name in buffer else g
                moved[name] = value - 0.1 * buffer[name]
        p = {**p, **moved}
    loss = squared(torch.func.functional_call(model, p, query[0]), query[1])
    return torch.autograd.grad(loss, list(start.values()), allow_unused=True)

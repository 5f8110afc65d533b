"""Models, tasks and the loop that users of learn2learn write; an explicit loop that knows no wrapper."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Task = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Recurrent(nn.Module):
    """A recurrent network that reads a sequence and answers from its last state."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 2) -> None:
        super().__init__()
        self.rnn = kind(4, 6, num_layers=layers, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """A weight in two layers, and a layer that is used under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.again = self.first
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.again):
            x = torch.tanh(layer(x))
        return self.head(x)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))


def conv() -> nn.Module:
    block = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*block, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 5)),
    "conv": (conv, (6, 2, 6, 6)),
    "lstm": (Recurrent, (6, 5, 4)),
    "tied": (Tied, (6, 5)),
}


def made(name: str) -> tuple[nn.Module, list[Task]]:
    """A model in float64, and three tasks for it."""
    make, shape = MODELS[name]
    model = make().double()

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(shape, dtype=torch.float64), torch.randint(3, shape[:1])

    return model, [(batch(), batch()) for _ in range(3)]


def loop(base: nn.Module, tasks: Iterable[Task], steps: int) -> Tensor:
    """What users write: clone, adapt, query loss, for one task after another. The mean of the query losses."""
    losses = []
    for (xs, ys), (xq, yq) in tasks:
        learner = base.clone()  # type: ignore[operator]
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(xs), ys))
        losses.append(F.cross_entropy(learner(xq), yq))
    return torch.stack(losses).mean()


Step = Callable[[str, Tensor, Tensor], Tensor]  # (name, parameter, gradient) -> update


def explicit(model: nn.Module, tasks: Iterable[Task], steps: int, update: Step, *, first_order: bool = False) -> Tensor:
    """The same by ``functional_call`` on a dict of weights, ``p <- p - update(name, p, g)``, from the model's own."""
    known = {id(p): n for n, p in model.named_parameters()}
    places = {  # of a weight in two layers both, of a layer with two names one
        f"{prefix}.{n}".lstrip("."): known[id(p)]
        for prefix, module in model.named_modules()
        for n, p in module.named_parameters(recurse=False)
    }
    losses = []
    for (xs, ys), (xq, yq) in tasks:
        phi: dict[str, Tensor] = dict(model.named_parameters())

        def call(x: Tensor, phi: dict[str, Tensor]) -> Tensor:
            state = {place: phi[name] for place, name in places.items()}
            state |= {n: b.clone() for n, b in model.named_buffers()}
            return functional_call(model, state, (x,), tie_weights=False)

        for _ in range(steps):
            g = torch.autograd.grad(
                F.cross_entropy(call(xs, phi), ys), list(phi.values()), create_graph=not first_order
            )
            phi = {n: p - update(n, p, d) for (n, p), d in zip(phi.items(), g, strict=True)}
        losses.append(F.cross_entropy(call(xq, phi), yq))
    return torch.stack(losses).mean()


def gradients(value: Tensor, to: Iterable[Tensor]) -> list[Tensor]:
    to = list(to)
    found = torch.autograd.grad(value, to, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(to, found, strict=True)]


def assert_equal(value: Iterable[Tensor], truth: Iterable[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(value, truth, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm().item() <= tolerance * max(1.0, b.norm().item())

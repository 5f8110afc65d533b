"""The networks whose operations are measured: the benchmarks' workloads, and what has the other operations.

Values are drawn at random, for a microbenchmark needs the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmeta.learner.models import conv_net, mlp
from fastmeta.tasks import TaskBatch

SEED = 20170309


@dataclass(frozen=True)
class Network:
    """A model with its loss and tasks; ``build`` makes them anew, the same every time.

    Attributes:
        name: as ``--workload`` takes it.
        title: what it is.
        build: model, loss and tasks.
        lr: inner rate, at which the loss does not diverge.
    """

    name: str
    title: str
    build: Callable[[], tuple[nn.Module, Any, TaskBatch]]
    lr: float = 0.01


class Encoder(nn.Module):
    """A small transformer: a block whose attention is one call, and one that has it in parts, then a linear layer."""

    def __init__(self, words: int, width: int, heads: int, ways: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([_Block(width, heads, fused) for fused in (True, False)])
        self.head = nn.Linear(width, ways)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[N, ways]`` of sentences ``[N, L]``."""
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.of_attention, self.of_rows = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.of_attention(x)
        q, k, v = (layer(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        rows: Tensor = x + self.down(F.gelu(self.up(self.of_rows(x))))
        return rows


class Ranking(nn.Module):
    """Whether a user likes an item: an embedding of the item beside the user's features, through a perceptron."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width)
        self.rows, self.dropout = mlp((2 * width, 64, 1)), nn.Dropout(0.1)

    def forward(self, item: Tensor, features: Tensor) -> Tensor:
        """Logits ``[N]`` of items ``[N]`` and features ``[N, width]``."""
        # A call that has no maps of its own, so that the operation for such is measured too.
        signed = torch.asinh(self.dropout(features))
        logits: Tensor = self.rows(torch.cat([self.items(item), signed], -1)).squeeze(-1)
        return logits


def _sinusoid() -> tuple[nn.Module, Any, TaskBatch]:
    x, y = torch.randn(2, 25, 10, 1), torch.randn(2, 25, 10, 1)
    return mlp((1, 40, 40, 1)), F.mse_loss, TaskBatch((x[0], y[0]), (x[1], y[1]))


def _images(tasks: int, ways: int, shots: int, queries: int, *shape: int) -> TaskBatch:
    def batch(each: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(ways).repeat_interleave(each).expand(tasks, -1).contiguous()
        return torch.randn(tasks, ways * each, *shape), labels

    return TaskBatch(batch(shots), batch(queries))


def _perceptron() -> tuple[nn.Module, Any, TaskBatch]:
    return mlp((784, 256, 128, 64, 5)), F.cross_entropy, _images(32, 5, 5, 5, 784)


def _conv(tasks: int, ways: int, queries: int, *image: int, filters: int) -> tuple[nn.Module, Any, TaskBatch]:
    model = conv_net(image[0], ways, filters, image[1])
    return model, F.cross_entropy, _images(tasks, ways, 1, queries, *image)


def _encoder() -> tuple[nn.Module, Any, TaskBatch]:
    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(1000, (4, n, 20)), torch.randint(5, (4, n))

    return Encoder(1000, 384, 12, 5), F.cross_entropy, TaskBatch(batch(5), batch(25))


def _ranking() -> tuple[nn.Module, Any, TaskBatch]:
    def batch(n: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (torch.randint(2000, (16, n)), torch.randn(16, n, 32)), torch.randint(2, (16, n)).float()

    return Ranking(2000, 32), F.binary_cross_entropy_with_logits, TaskBatch(batch(20), batch(20))


def _tiny() -> tuple[nn.Module, Any, TaskBatch]:
    x, y = torch.randn(2, 3, 4, 1), torch.randn(2, 3, 4, 1)
    return mlp((1, 8, 1)), F.mse_loss, TaskBatch((x[0], y[0]), (x[1], y[1]))


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("sinusoid", "sinusoid, 1-40-40-1, T = 25, 10 + 10", _sinusoid),
        Network("mlp784", "MLP 784-256-128-64-5, T = 32, 25 + 25", _perceptron),
        Network("omniglot_5way", "Conv4-64 28x28, T = 32, 5 + 5", lambda: _conv(32, 5, 1, 1, 28, 28, filters=64)),
        Network("omniglot_20way", "Conv4-64 28x28, T = 4, 20 + 20", lambda: _conv(4, 20, 1, 1, 28, 28, filters=64)),
        Network("conv4_84", "Conv4-32 84x84, T = 4, 5 + 75", lambda: _conv(4, 5, 15, 3, 84, 84, filters=32)),
        Network("encoder", "two transformer blocks of width 384, T = 4, 5 + 25 sentences of 20 words", _encoder),
        Network("ranking", "2000 items, T = 16, 20 + 20 ratings", _ranking),
    )
}
QUICK = Network("tiny", "MLP 1-8-1, T = 3, 4 + 4", _tiny)  # what --quick measures where no workload is named


def built(network: Network) -> tuple[nn.Module, Any, TaskBatch]:
    """Model, loss and tasks of a network, the same every time, without touching anybody's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return network.build()

"""What is timed: one meta-gradient of a batch of few-shot tasks, on the same inputs for everyone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import sentences
from fastmeta.core.rounding import nudged

Batch = tuple[Tensor, Tensor]
# Of the untuned and the large a workload runs only when it is named: shapes that no kernel was made for, and networks
# of which a peer's meta-gradient takes seconds or minutes.
Group = Literal["usual", "untuned", "large"]

SEED = 20170309
# So many that the first outputs move by about as much as another order of summation moves them: a convolution of 576
# products of size 1/24 gets a standard deviation of 1.6e-7, and its float32 result is 1e-7 to 5e-7 from float64.
ULPS = 4


@dataclass(frozen=True)
class Problem:
    """A meta-gradient to compute: that of the mean query loss after ``steps`` of inner SGD."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    support: Batch  # [T, N, ...], [T, N, ...]
    query: Batch
    lr: float
    steps: int
    note: str = ""  # what is not as the workload's name says
    adapted: tuple[str, ...] | None = None  # names of the parameters that adapt; all of them where None

    def adapts(self, name: str) -> bool:
        """Whether the inner loop updates this parameter; the others get their meta-gradient alone."""
        return self.adapted is None or name in self.adapted

    @property
    def tasks(self) -> int:
        return self.support[0].shape[0]

    def first(self, tasks: int) -> Problem:
        """The same problem with the first ``tasks`` tasks alone."""
        return self._cut(slice(0, tasks))

    def only(self, task: int) -> Problem:
        """The same problem with one task alone."""
        return self._cut(slice(task, task + 1))

    def repeated(self, tasks: int) -> Problem:
        """The first task, ``tasks`` times: its meta-gradient is that of the task alone."""
        return self._cut([0] * tasks)

    def _cut(self, part: slice | list[int]) -> Problem:
        support, query = ((x[part], y[part]) for x, y in (self.support, self.query))
        return dataclasses.replace(self, support=support, query=query)

    def double(self) -> Problem:
        """The same problem in float64."""

        def wide(batch: Batch) -> Batch:
            x, y = (t.double() if t.is_floating_point() else t for t in batch)
            return x, y

        model = copy.deepcopy(self.model).double()
        return dataclasses.replace(self, model=model, support=wide(self.support), query=wide(self.query))

    def on(self, device: str) -> Problem:
        """The same problem on a device."""
        support, query = ((x.to(device), y.to(device)) for x, y in (self.support, self.query))
        return dataclasses.replace(self, model=copy.deepcopy(self.model).to(device), support=support, query=query)

    def nudged(self, seed: int) -> Problem:
        """The same problem with every weight moved by up to ``ULPS`` units in its last place, at random."""
        return dataclasses.replace(self, model=nudged(self.model, seed, ulps=ULPS))


@dataclass(frozen=True)
class Workload:
    """A named problem; ``build`` makes it anew, the same every time."""

    name: str
    title: str
    build: Callable[[], Problem]
    group: Group = "usual"
    compile_s: int = 100  # seconds that a compiled form has to get ready, in the process that tries it first
    nudges: int = 6  # copies with nudged weights that float32's error is measured on


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with ``activation`` in between."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [activation()] if i else []
        layers += [nn.Linear(a, b)]
    return nn.Sequential(*layers)


def conv4(
    channels: int, filters: int, size: int, ways: int, *, kernel: int = 3, norm: bool = True, pool: bool = True
) -> nn.Sequential:
    """Four blocks of convolution, batch norm on the batch's own statistics, ReLU and 2x2 max-pool; then linear.

    Without ``pool`` the convolutions have stride 2 instead.
    """
    layers: list[nn.Module] = []
    for i in range(4):
        stride = 1 if pool else 2
        layers.append(nn.Conv2d(filters if i else channels, filters, kernel, stride, kernel // 2))
        layers += [nn.BatchNorm2d(filters, track_running_stats=False)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)] if pool else [nn.ReLU()]
        size = size // 2 if pool else (size + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * size**2, ways))


def sinusoid(
    steps: int, tasks: int = 25, samples: int = 10, width: int = 40, activation: Callable[[], nn.Module] = nn.ReLU
) -> Problem:
    """Regression of the MAML paper: amplitude in [0.1, 5], phase in [0, pi], inputs in [-5, 5]."""
    generator = torch.Generator().manual_seed(SEED)
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = torch.pi * torch.rand(tasks, 1, 1, generator=generator)

    def batch() -> Batch:
        x = 10 * torch.rand(tasks, samples, 1, generator=generator) - 5
        return x, amplitude * torch.sin(x - phase)

    model = _seeded(lambda: mlp(1, width, width, 1, activation=activation))
    return Problem(model, F.mse_loss, batch(), batch(), 0.01, steps)


def mlp784(*hidden: int) -> Problem:
    """A perceptron on flat 28x28 images, with 256, 128 and 64 hidden units as a rule; 5-way 5-shot, 25 query images."""
    support, query, note = characters(tasks=32, ways=5, shots=5, queries=5)
    flat = (support[0].flatten(2), support[1]), (query[0].flatten(2), query[1])
    return Problem(_seeded(lambda: mlp(784, *(hidden or (256, 128, 64)), 5)), F.cross_entropy, *flat, 0.01, 5, note)


def omniglot(tasks: int, ways: int, steps: int, lr: float, filters: int = 64, **kinds: Any) -> Problem:
    """Conv4, 1-shot, one query image a class; ``kinds`` as :func:`conv4` takes them."""
    support, query, note = characters(tasks, ways, shots=1, queries=1)
    model = _seeded(lambda: conv4(1, filters, 28, ways, **kinds))
    return Problem(model, F.cross_entropy, support, query, lr, steps, note)


def mini84() -> Problem:
    """Conv4 with 32 filters on 84x84 colour images, 5-way 1-shot, 15 query images a class."""
    generator = torch.Generator().manual_seed(SEED)
    prototypes = torch.randn(4, 5, 1, 3, 84, 84, generator=generator)

    def batch(shots: int) -> Batch:
        images = prototypes + torch.randn(4, 5, shots, 3, 84, 84, generator=generator)
        return images.flatten(1, 2), torch.arange(5).repeat_interleave(shots).expand(4, -1).contiguous()

    return Problem(_seeded(lambda: conv4(3, 32, 84, 5)), F.cross_entropy, batch(1), batch(15), 0.01, 5)


def wide() -> Problem:
    """A perceptron of 4096 units a layer on random vectors: 160 MB of weights, of which peers hold one a task."""
    generator = torch.Generator().manual_seed(SEED)

    def batch(n: int) -> Batch:
        return torch.randn(32, n, 4096, generator=generator), torch.randint(10, (32, n), generator=generator)

    return Problem(_seeded(lambda: mlp(4096, 4096, 4096, 10)), F.cross_entropy, batch(5), batch(15), 0.01, 3)


def square(tasks: int, steps: int, samples: int, width: int, layers: int = 2) -> Problem:
    """A perceptron of so many square ``layers`` and one to 10 on random vectors, as many for the query set."""
    generator = torch.Generator().manual_seed(SEED)

    def batch() -> Batch:
        x = torch.randn(tasks, samples, width, generator=generator)
        return x, torch.randint(10, (tasks, samples), generator=generator)

    widths = [width] * (layers + 1)
    return Problem(_seeded(lambda: mlp(*widths, 10)), F.cross_entropy, batch(), batch(), 0.01, steps)


def minilm(*, head_only: bool) -> Problem:
    """A pretrained sentence encoder on 5-way 1-shot intents, 25 query sentences; all its linear layers adapt, or none
    but the head (ANIL)."""
    model = _seeded(lambda: sentences.classifier(5))
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    chosen = ["head"] if head_only else layers
    adapted = tuple(f"{layer}.{kind}" for layer in chosen for kind in ("weight", "bias"))
    tasks = sentences.episodes(_data("clinc150.jsonl"), SEED, tasks=4, ways=5, shots=1, queries=5)
    return Problem(model, F.cross_entropy, *tasks, 0.1 if head_only else 0.01, 3, adapted=adapted)


def characters(tasks: int, ways: int, shots: int, queries: int) -> tuple[Batch, Batch, str]:
    """Few-shot episodes of 28x28 images, ink = 1: Omniglot's where the data file is found, else random strokes.

    Returns:
        support, query and a note that is empty for the real images.
    """
    rng = np.random.default_rng(SEED)
    n = shots + queries
    path = _data("omniglot28.npz")
    if not path.is_file():
        images = (rng.random((tasks, ways, n, 28, 28)) < 0.1).astype(np.float32)
        note = "random images: omniglot28.npz was not found (FASTMETA_DATA names its folder)"
    else:
        with np.load(path) as data:
            everything = data["images"]
        picked = np.stack([rng.choice(everything.shape[0], ways, replace=False) for _ in range(tasks)])
        drawn = rng.permuted(np.tile(np.arange(everything.shape[1]), (tasks, ways, 1)), axis=-1)[..., :n]
        images = 1 - everything[picked[..., None], drawn].astype(np.float32) / 255
        note = ""
    labels = torch.arange(ways)

    def batch(part: np.ndarray) -> Batch:
        x = torch.from_numpy(np.ascontiguousarray(part)).flatten(1, 2).unsqueeze(2)
        return x, labels.repeat_interleave(part.shape[2]).expand(tasks, -1).contiguous()

    return batch(images[:, :, :shots]), batch(images[:, :, shots:]), note


def _data(name: str) -> Path:
    folder = os.environ.get("FASTMETA_DATA")
    root = Path(folder) if folder else Path(__file__).resolve().parents[2] / "shared" / "data"
    return root / name


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return make()


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("sinusoid_k1", "sinusoid, 1-40-40-1, T = 25, 10 + 10, K = 1", lambda: sinusoid(1)),
        Workload("sinusoid_k5", "sinusoid, 1-40-40-1, T = 25, 10 + 10, K = 5", lambda: sinusoid(5)),
        Workload(
            "sinusoid_tanh",
            "sinusoid, 1-64-64-1, tanh, T = 100, 10 + 10, K = 5",
            lambda: sinusoid(5, tasks=100, width=64, activation=nn.Tanh),
        ),
        Workload("mlp784", "MLP 784-256-128-64-5, T = 32, 25 + 25, K = 5", mlp784),
        Workload(
            "omniglot_5way",
            "Conv4-64 28x28, 5-way 1-shot, T = 32, K = 1",
            lambda: omniglot(32, 5, 1, 0.4),
            compile_s=300,
        ),
        Workload("omniglot_20way", "Conv4-64 28x28, 20-way 1-shot, T = 4, K = 5", lambda: omniglot(4, 20, 5, 0.1)),
        Workload("conv4_84", "Conv4-32 84x84, T = 4, 5 + 75, K = 5", mini84),
        Workload("filters_48", "Conv4-48 28x28, 10-way, T = 8, K = 1", lambda: omniglot(8, 10, 1, 0.1, 48), "untuned"),
        Workload(
            "kernel_5x5", "Conv4-32 28x28, 5x5, T = 8, K = 1", lambda: omniglot(8, 5, 1, 0.1, 32, kernel=5), "untuned"
        ),
        Workload(
            "stride_2", "Conv4-64 28x28, stride, T = 8, K = 1", lambda: omniglot(8, 5, 1, 0.1, pool=False), "untuned"
        ),
        Workload(
            "no_norm", "Conv4-64 28x28, no norm, T = 8, K = 1", lambda: omniglot(8, 5, 1, 0.01, norm=False), "untuned"
        ),
        Workload("ten_steps", "Conv4-64 28x28, T = 2, K = 10", lambda: omniglot(2, 5, 10, 0.05), "untuned"),
        Workload("one_task", "Conv4-64 28x28, T = 1, K = 1", lambda: omniglot(1, 5, 1, 0.1), "untuned"),
        Workload("wide", "MLP 4096-4096-4096-10, T = 32, 5 + 15, K = 3", wide, "large", nudges=1),
        Workload("minilm", "MiniLM, T = 4, 5 + 25 sentences, K = 3", lambda: minilm(head_only=False), "large"),
        Workload("minilm_head", "MiniLM, head, T = 4, 5 + 25, K = 3", lambda: minilm(head_only=True), "large"),
    )
}
QUICK_WORKLOADS = ("sinusoid_k1", "sinusoid_k5", "mlp784")  # what a quick run measures


def named(name: str) -> Workload:
    """The workload of this name; ``square:T,K,N,width,layers`` stands for :func:`square` of these."""
    kind, _, numbers = name.partition(":")
    if kind != "square":
        return WORKLOADS[name]
    sizes = [int(number) for number in numbers.split(",")]
    return Workload(name, name, lambda: square(*sizes))

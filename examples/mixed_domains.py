"""Tasks of two kinds in one schedule: images and sentences, each through its own front end into one body and head.

What adapts to a task is shared by both kinds. Every optimizer step goes along the meta-gradients of both, added up, or
of one kind after the other: they are ordinary gradients of ordinary parameters, so that any schedule will do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from examples.common import percent, progress, table
from fastmeta.learner.evaluation import Evaluation, evaluate
from fastmeta.tasks import (
    ClassPool,
    EpisodeSampler,
    SquareSymmetries,
    TaskSampler,
    Trim,
    load_digits_pools,
    load_omniglot,
    read_sentences,
    sentence_pool,
)

WAYS, WIDTH, STEPS = 5, 64, 3
UNKNOWN = 1  # the token of words that training has not seen; 0 is the padding


class Words(nn.Module):
    """Features ``[N, width]`` of tokens ``[N, L]``: the mean of their words' vectors, and a layer."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Features."""
        weights = (tokens != 0).unsqueeze(-1).to(self.table.weight.dtype)
        mean: Tensor = (self.table(tokens) * weights).sum(1) / weights.sum(1)
        return self.out(mean)


class Domains:
    """Two learners, which share ``body`` and adapt it alone; the optimizer sees each parameter once.

    Args:
        images: front end of images, to features ``[N, 64]``.
        texts: front end of tokens, likewise.
        lr: inner rate.
    """

    def __init__(self, images: nn.Module, texts: nn.Module, lr: float = 0.2) -> None:
        body = nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WAYS))
        fronts = {"images": images, "texts": texts}
        self.learners = {
            kind: fm.MAML(nn.Sequential(front, body), F.cross_entropy, lr=lr, steps=STEPS, parameters=["1.*"])
            for kind, front in fronts.items()
        }
        self.parameters = list(nn.ModuleList(self.learners.values()).parameters())

    def step(self, optimizer: torch.optim.Optimizer, tasks: dict[str, fm.TaskBatch]) -> dict[str, Tensor]:
        """One step along the sum of the meta-gradients of the kinds that ``tasks`` holds; their losses."""
        optimizer.zero_grad()
        losses = {kind: self.learners[kind](batch).loss for kind, batch in tasks.items()}
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {kind: loss.detach() for kind, loss in losses.items()}


def image_pools(path: Path | None, seed: int) -> tuple[ClassPool, ClassPool, nn.Module]:
    """Omniglot's classes to train and to test, or the digits' where there is no path; and a front end for them."""
    if path is None:
        digits = load_digits_pools(seed=seed)
        return digits.train, digits.test, fm.models.conv_net(1, WIDTH, 32, 8, blocks=3)
    train, _, test = load_omniglot(path).split(seed=seed)
    return train, test, fm.models.conv_net(1, WIDTH, 32, 28)


def text_pools(path: Path, seed: int) -> tuple[ClassPool, ClassPool, nn.Module]:
    """Intents to train and others to test, as numbers of words; and a front end for them."""
    texts, intents = read_sentences(path, "train")
    order = np.random.default_rng(seed).permutation(sorted(set(intents)))
    training = set(order[: round(2 / 3 * len(order))])
    counts = Counter(w for text, i in zip(texts, intents, strict=True) if i in training for w in text.split())
    numbers = {word: UNKNOWN + 1 + i for i, (word, n) in enumerate(counts.most_common()) if n > 1}
    pool = sentence_pool(texts, intents, lambda text: [numbers.get(word, UNKNOWN) for word in text.split()])
    chosen = np.array([name in training for name in pool.classes])
    train, test = pool.select(chosen.nonzero()[0]), pool.select((~chosen).nonzero()[0])
    return train, test, Words(UNKNOWN + 1 + len(numbers), WIDTH)


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Meta-train on both; of each kind the figures at random weights and as trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="clinc150.jsonl")
    parser.add_argument("--images", type=Path, help="omniglot28.npz; scikit-learn's digits where left out")
    parser.add_argument("--schedule", choices=["sum", "alternate"], default="sum")
    parser.add_argument("--iterations", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of a kind in a step")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--test-tasks", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    images_train, images_test, images = image_pools(options.images, options.seed)
    texts_train, texts_test, texts = text_pools(options.texts, options.seed)
    domains = Domains(images, texts)

    def sampler(pool: ClassPool, kind: str, seed: int, turned: bool = False) -> TaskSampler:
        sizes = {"ways": WAYS, "shots": options.shots, "queries": 5, "tasks": options.tasks}
        if kind == "texts":
            return EpisodeSampler(pool, **sizes, seed=seed, prepare=Trim())
        return EpisodeSampler(pool, **sizes, seed=seed, variants=SquareSymmetries() if turned else None)

    def judged(kind: str) -> Evaluation:
        unseen = sampler(images_test if kind == "images" else texts_test, kind, options.seed + 1)
        return evaluate(domains.learners[kind], unseen, "accuracy", tasks=options.test_tasks, steps=STEPS)

    fresh = {kind: judged(kind) for kind in domains.learners}
    streams = {
        "images": sampler(images_train, "images", options.seed, turned=True),
        "texts": sampler(texts_train, "texts", options.seed),
    }
    optimizer = torch.optim.Adam(domains.parameters, 2e-3)
    kinds = list(streams)

    def step(i: int) -> str:
        now = kinds if options.schedule == "sum" else [kinds[i % 2]]
        losses = domains.step(optimizer, {kind: streams[kind].sample() for kind in now})
        return "  ".join(f"{kind} {loss:.2f}" for kind, loss in losses.items())

    progress(options.iterations, options.schedule, step)
    found = {kind: (fresh[kind], judged(kind)) for kind in kinds}
    table(
        f"{WAYS}-way {options.shots}-shot accuracy on unseen classes",
        ["tasks", "random weights, adapted", "meta-trained, before adaptation", "meta-trained, adapted"],
        [[kind, percent(a.after), percent(b.before), percent(b.after)] for kind, (a, b) in found.items()],
    )
    return found


if __name__ == "__main__":
    main()

"""Omniglot by four algorithms side by side: MAML, ANIL, Reptile and MAML++, at an equal number of equal tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from examples.common import percent, progress, table
from fastmeta.learner.evaluation import Evaluation, evaluate
from fastmeta.tasks import EpisodeSampler, SquareSymmetries, load_omniglot

# The inner steps are as many for all, so that a meta-step sees as much; the rates are each one's own.
LEARNERS: dict[str, Callable[[nn.Module, int], fm.MAML]] = {
    "MAML": lambda model, steps: fm.MAML(model, F.cross_entropy, lr=0.4, steps=steps),
    "ANIL": lambda model, steps: fm.ANIL(model, F.cross_entropy, lr=0.4, steps=steps),
    "Reptile": lambda model, steps: fm.Reptile(model, F.cross_entropy, lr=0.05, steps=steps),
    "MAML++": lambda model, steps: fm.MAMLPlusPlus(model, F.cross_entropy, lr=0.1, steps=steps),
}
EPOCHS = 150  # of a run, by which MAML++ anneals


def main(arguments: Sequence[str] | None = None) -> dict[str, Evaluation]:
    """Train each, and compare them on unseen characters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="omniglot28.npz, or the folder of the original data")
    parser.add_argument("--algorithm", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--iterations", type=int, default=2000, help="meta-steps of each")
    parser.add_argument("--tasks", type=int, default=8, help="tasks a meta-step")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="inner steps")
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--characters", type=int, default=1100, help="to train; 100 validate, which is not used here")
    parser.add_argument("--test-tasks", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    pools = load_omniglot(options.data).split(options.characters, seed=options.seed)
    sizes = {"ways": options.ways, "shots": options.shots, "queries": 5, "tasks": options.tasks}
    found = {}
    for name in options.algorithm:
        torch.manual_seed(options.seed)  # all start from the same weights and see the same tasks
        learner = LEARNERS[name](fm.models.conv4(1, options.ways, options.filters, 28), options.steps)
        train(learner, EpisodeSampler(pools[0], **sizes, seed=options.seed, variants=SquareSymmetries()), options, name)
        unseen = EpisodeSampler(pools[2], **sizes, seed=options.seed + 1)
        found[name] = evaluate(learner, unseen, "accuracy", tasks=options.test_tasks, steps=options.steps)
    table(
        f"Omniglot, {options.ways}-way {options.shots}-shot accuracy on unseen characters",
        ["algorithm", "before adaptation", f"after {options.steps} steps"],
        [[name, percent(e.before), percent(e.after)] for name, e in found.items()],
    )
    return found


def train(learner: fm.MAML, sampler: EpisodeSampler, options: argparse.Namespace, label: str) -> None:
    """Adam on the meta-gradient, which Reptile and MAML++ have too, each its own."""
    optimizer = torch.optim.Adam(learner.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations)

    def step(i: int) -> str:
        if isinstance(learner, fm.MAMLPlusPlus):
            learner.epoch = EPOCHS * i // options.iterations
        optimizer.zero_grad()
        loss = learner(sampler.sample()).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        return f"loss {loss:.3f}"

    progress(options.iterations, label, step)


if __name__ == "__main__":
    main()

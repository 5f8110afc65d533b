"""Cold-start recommendation: every user is a task, and a few ratings are all that is known of a new one.

Ratings are made up: users and items have latent tastes, some items are better than others, and there is noise. What all
users share is learned: a vector and a merit for each item, and where to begin with a user. A new user's taste is what a
few inner steps on their ratings make of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.learner.metric import ndcg


class Ranker(nn.Module):
    """Scores items ``[N]`` by a vector and a merit of their own; the taste that weighs vectors is a user's."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.vector = nn.Embedding(items, width)
        self.merit = nn.Embedding(items, 1)
        self.taste = nn.Linear(width, 1)
        nn.init.normal_(self.vector.weight, std=width**-0.5)
        nn.init.zeros_(self.merit.weight)

    def forward(self, items: Tensor) -> Tensor:
        """Predicted ratings ``[N]`` of items ``[N]``."""
        ratings: Tensor = (self.taste(self.vector(items)) + self.merit(items)).squeeze(-1)
        return ratings


class World(NamedTuple):
    """Who likes what: ratings from 0 to 4, ``[users, items]``."""

    ratings: Tensor

    @classmethod
    def made(cls, users: int, items: int, factors: int = 4, *, seed: int) -> World:
        """Rounded ``2 + merit_i + <taste_u, trait_i> + noise``."""
        random = torch.Generator().manual_seed(seed)
        taste, trait = (torch.randn(n, factors, generator=random) * factors**-0.25 for n in (users, items))
        merit = 0.5 * torch.randn(items, generator=random)
        noise = 0.3 * torch.randn(users, items, generator=random)
        return cls((2 + merit + taste @ trait.T + noise).round().clamp(0, 4))

    def tasks(self, users: range, rated: int, asked: int, *, seed: int) -> list[Any]:
        """One task a user: ``rated`` items to adapt to, ``asked`` others to be ranked."""
        random = torch.Generator().manual_seed(seed)
        tasks = []
        for user in users:
            items = torch.randperm(self.ratings.shape[1], generator=random)[: rated + asked]
            ratings = self.ratings[user, items]
            tasks.append(((items[:rated], ratings[:rated]), (items[rated:], ratings[rated:])))
        return tasks


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, compare on users never seen, and recommend; NDCG@10 by how items are ranked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=2000, help="users to train on")
    parser.add_argument("--tested", type=int, default=500, help="users never seen, to test on")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--rated", type=int, default=10, help="ratings that are known of a user")
    parser.add_argument("--asked", type=int, default=50, help="items to be ranked for a user")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    world = World.made(options.users + options.tested, options.items, seed=options.seed)
    train = world.tasks(range(options.users), options.rated, options.asked, seed=1)
    test = world.tasks(range(options.users, options.users + options.tested), options.rated, options.asked, seed=2)

    torch.manual_seed(options.seed)
    learner = fm.MetaLearner(
        Ranker(options.items, width=8),
        algorithm="anil",  # the taste adapts; vectors and merits are learned by the outer loop alone
        loss="mse_loss",
        inner_lr=0.5,
        inner_steps=5,
        meta_lr=2e-2,
        metric="ndcg@10",
        random_state=options.seed,
    )
    learner.fit(train, epochs=options.epochs, tasks_per_step=32)

    found = learner.evaluate(test)
    means = mean_ratings(train, options.items)
    popular = torch.stack([ndcg(means[items][None], ratings[None], k=10)[0] for _, (items, ratings) in test])
    result = {"not adapted": found.before.mean, "popularity": float(popular.mean()), "adapted": found.after.mean}
    print(f"NDCG@10 of {options.asked} items, {options.tested} new users with {options.rated} ratings each")
    for name, value in result.items():
        print(f"  {name:<12} {value:.4f}")

    (rated, ratings), _ = test[0]
    best = learner.recommend((rated, ratings), torch.arange(options.items), k=5, exclude=rated)
    print(f"for the first of them, of all {options.items} items (their ratings, which nobody had seen):")
    for item, score in zip(best.items.tolist(), best.scores.tolist(), strict=True):
        print(f"  item {item:>4}  predicted {score:.2f}  true {world.ratings[options.users, item]:.0f}")
    return result


def mean_ratings(tasks: list[Any], items: int) -> Tensor:
    """What these users give each item on average, ``[items]``; 0 for one that none has rated."""
    rated = torch.cat([part[0] for task in tasks for part in task])
    ratings = torch.cat([part[1] for task in tasks for part in task])
    return torch.zeros(items).index_add_(0, rated, ratings) / rated.bincount(minlength=items).clamp(min=1)


if __name__ == "__main__":
    main()

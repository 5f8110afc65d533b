"""Recommendation: adapting to a new user's ratings ranks items better than popularity does, and than not adapting."""

from __future__ import annotations

import pytest
import torch

from examples import recommend


def test_adaptation_helps_a_new_user(capsys: pytest.CaptureFixture[str]) -> None:
    found = recommend.main(["--users", "200", "--tested", "60", "--items", "50", "--asked", "25", "--epochs", "10"])
    assert found["adapted"] > found["not adapted"] + 0.08
    assert found["adapted"] > found["popularity"] + 0.08
    assert found["popularity"] > 0.6  # a baseline that is one: a random order has less
    printed = capsys.readouterr().out
    assert f"adapted      {found['adapted']:.4f}" in printed
    assert printed.count("predicted") == 5


def test_popularity_and_tasks_are_what_they_say() -> None:
    world = recommend.World.made(6, 9, seed=3)
    assert torch.equal(world.ratings, recommend.World.made(6, 9, seed=3).ratings)
    tasks = world.tasks(range(2, 6), 3, 4, seed=1)
    assert len(tasks) == 4
    for user, ((rated, ratings), (asked, answers)) in zip(range(2, 6), tasks, strict=True):
        assert len({*rated.tolist(), *asked.tolist()}) == 7
        assert torch.equal(world.ratings[user, rated], ratings)
        assert torch.equal(world.ratings[user, asked], answers)
    means = recommend.mean_ratings(tasks, 9)
    seen = [[float(r[i == item]) for t in tasks for i, r in t if (i == item).any()] for item in range(9)]
    assert means.tolist() == pytest.approx([sum(s) / max(1, len(s)) for s in seen])

from __future__ import annotations

import json
from typing import Any

import pytest

from fastmeta.learner.config import PROBLEMS, TrainConfig, defaults


@pytest.mark.parametrize("problem", PROBLEMS)
def test_settings_survive_json(problem: str) -> None:
    config = defaults(problem).changed(seed=3, data=None)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.problem == problem


def test_changed_keeps_what_is_none() -> None:
    config = defaults("digits").changed(ways=2, shots=None)
    assert (config.ways, config.shots) == (2, defaults("digits").shots)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ways": 0}, ValueError, "train: ways must be at least 1, got 0"),
        ({"iterations": 0}, ValueError, "train: iterations must be at least 1"),
        ({"inner_steps": -1}, ValueError, "train: inner_steps must be at least 0"),
        ({"inner_lr": 0.0}, ValueError, "train: inner_lr must be positive and finite"),
        ({"meta_lr": float("nan")}, ValueError, "train: meta_lr must be positive and finite"),
        ({"val_tasks": 1}, ValueError, "train: val_tasks must be at least 2"),
        ({"ways": 2.5}, TypeError, "train: ways must be of type int, got 2.5"),
        ({"ways": True}, TypeError, "train: ways must be of type int, got True"),
        ({"first_order": 1}, TypeError, "train: first_order must be of type bool, got 1"),
        ({"problem": "mnist"}, ValueError, "train: problem must be one of 'sinusoid', 'digits', 'omniglot'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        defaults("digits").changed(**change)


@pytest.mark.parametrize("damage", [{"ways": "five"}, {"surprise": 1}, {"ways": 0}])
def test_damaged_settings_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="train: "):
        TrainConfig.from_json({**defaults("digits").to_json(), **damage})


def test_missing_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the names of TrainConfig, got a difference in \['ways'\]"):
        TrainConfig.from_json({k: v for k, v in defaults("digits").to_json().items() if k != "ways"})
    with pytest.raises(ValueError, match="got a difference in list"):
        TrainConfig.from_json([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="problem must be one of"):
        defaults("mnist")

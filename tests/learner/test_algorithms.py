"""Every algorithm that a run can name trains, saves, goes on and is judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastmeta.cli.train import AlgorithmName
from fastmeta.learner.algorithms import CLASSES, learner_of
from fastmeta.learner.config import ALGORITHMS, TrainConfig, defaults
from fastmeta.learner.models import Modulated
from fastmeta.learner.problems import build
from fastmeta.learner.results import judge, load_learner
from fastmeta.learner.run import open_new
from fastmeta.learner.training import Trainer


def settings(algorithm: str) -> TrainConfig:
    return defaults("sinusoid").changed(
        algorithm=algorithm, iterations=4, meta_batch=2, filters=2, inner_steps=2, eval_steps=3, queries=2,
        val_every=2, val_tasks=2, log_every=2, inner_lr=0.01, meta_lr=1e-2,
    )  # fmt: skip


def test_the_names_agree() -> None:
    assert set(ALGORITHMS) == set(CLASSES) == {name.value for name in AlgorithmName}


def test_each_name_makes_its_algorithm() -> None:
    for name in ALGORITHMS:
        config = settings(name)
        problem = build(config)
        if name == "protomaml":
            problem = dataclasses.replace(problem, metric="accuracy")
        assert type(learner_of(config, problem)).__name__ == CLASSES[name]


def test_cavia_has_a_place_for_its_context() -> None:
    waves = settings("cavia")
    assert waves.context == 5
    learner = learner_of(waves, build(waves))
    assert next(p.shape for p in learner.model.model.parameters()) == (40, 1 + 5)
    images = defaults("digits").changed(algorithm="cavia", filters=2, meta_batch=2, inner_lr=20.0)
    assert images.context == 100
    images = images.changed(context=3)
    problem = build(images)
    assert isinstance(problem.model, Modulated)
    learner, first_order = learner_of(images, problem), learner_of(images.changed(first_order=True), problem)
    learner.engine = first_order.engine = "autodiff"  # spares the time of tracing
    tasks = problem.sampler("train", 2).sample()
    assert learner.adapt(tasks).parameters["context"].shape == (2, 3)
    assert learner.adapt(tasks).parameters["context"].abs().max() > 0
    one, two = (made.value_and_grad(tasks)[1]["model.film.weight"] for made in (learner, first_order))
    assert one.abs().max() > 0
    assert not torch.allclose(one, two)


@pytest.mark.parametrize("algorithm", ["metasgd", "mamlpp"])
def test_a_run_goes_on_where_it_stopped(algorithm: str, tmp_path: Path) -> None:
    config = settings(algorithm)
    whole = Trainer(config, build(config), open_new(tmp_path / "whole", config))
    before = {n: p.clone() for n, p in whole.maml.named_parameters() if not n.startswith("model.")}
    assert whole.fit() == "finished"
    assert before
    assert all(not torch.equal(p, before[n]) for n, p in whole.maml.named_parameters() if n in before)
    run = open_new(tmp_path / "halves", config)
    half = Trainer(config, build(config), run)
    assert half.fit(stop=lambda: half.state.step == 2) == "interrupted"
    again = Trainer(config, build(config), run)
    again.resume()
    assert again.fit() == "finished"
    state = whole.maml.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.maml.state_dict().items())
    learner, problem, _, step = load_learner(run.folder, "last")
    assert step == 4
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert judge(learner, problem, config, step, tasks=2)["after"] > 0


def test_settings_of_runs_from_before() -> None:
    values = defaults("digits").to_json()
    for later in ("algorithm", "accumulate", "context"):
        del values[later]
    assert TrainConfig.from_json(values) == defaults("digits").changed(context=5)  # which nothing of theirs reads


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="train: algorithm must be one of"):
        settings("prototypes")
    waves = defaults("sinusoid").changed(algorithm="protomaml")
    with pytest.raises(ValueError, match="train: algorithm must be one without prototypes for sinusoid"):
        learner_of(waves, build(waves))
    config = settings("reptile").changed(first_order=True)
    with pytest.raises(ValueError, match="train: first_order must be left out with algorithm reptile"):
        learner_of(config, build(config))

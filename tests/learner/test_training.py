from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmeta.learner import checkpoint
from fastmeta.learner.config import TrainConfig, defaults
from fastmeta.learner.log import read_metrics
from fastmeta.learner.problems import Problem, build
from fastmeta.learner.progress import Silent
from fastmeta.learner.results import conclude, load_learner
from fastmeta.learner.run import Run, open_existing, open_new
from fastmeta.learner.training import Trainer
from fastmeta.tasks import Sinusoid, TaskBatch

CLOCKS = ("seconds", "tasks_per_s")  # the only figures of a record that may differ between runs


def small(**changes: Any) -> TrainConfig:
    base = defaults("sinusoid").changed(
        meta_batch=3, shots=4, queries=4, iterations=12, val_every=5, val_tasks=4, log_every=2, eval_steps=2
    )
    return base.changed(**changes)


def noisy(config: TrainConfig) -> Problem:
    """A network that draws random numbers, so that PyTorch's generator matters too."""
    torch.manual_seed(config.seed)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))

    def sampler(stream: str, tasks: int, seed: int | None = None) -> Sinusoid:
        return Sinusoid(tasks, 4, seed=len(stream) + (seed or 0))

    return Problem(model, F.mse_loss, "mse", sampler)


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_metrics(folder / "metrics.jsonl")]


def parts_of(batches: list[TaskBatch]) -> list[tuple[Any, Any]]:
    return [(batch.support, batch.query) for batch in batches]


class StopAt(Silent):
    """Asks to stop after a step, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.asked = False

    def advance(self, step: int, figures: object) -> None:
        self.asked = self.asked or step == self.step


def trainer_for(
    config: TrainConfig, run: Run, problem: Callable[[TrainConfig], Problem], stop: int
) -> tuple[Trainer, StopAt]:
    reporter = StopAt(stop)
    return Trainer(config, problem(config), run, reporter), reporter


@pytest.mark.parametrize("problem", [build, noisy])
@pytest.mark.parametrize("stops", [[3], [5], [1, 6, 11]])
def test_a_resumed_run_gives_the_same_numbers(
    tmp_path: Path, problem: Callable[[TrainConfig], Problem], stops: list[int], set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    config = small()
    whole, _ = trainer_for(config, open_new(tmp_path / "whole", config), problem, 0)
    assert whole.fit() == "finished"

    trainer, reporter = trainer_for(config, open_new(tmp_path / "parts", config), problem, stops[0])
    for stop in [*stops[1:], 0]:
        assert trainer.fit(stop=lambda: reporter.asked) == "interrupted"  # noqa: B023
        torch.manual_seed(99)  # a new process would start with another state
        trainer, reporter = trainer_for(config, open_existing(tmp_path / "parts", config), problem, stop)
        trainer.resume()
    assert trainer.fit() == "finished"

    for (name, one), two in zip(
        whole.problem.model.state_dict().items(), trainer.problem.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), name
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert [r["step"] for r in figures(tmp_path / "whole") if r["kind"] == "validation"] == [0, 5, 10, 12]
    for name in ("last", "best"):
        one, two = (checkpoint.load(tmp_path / run / "checkpoints", name)[0] for run in ("whole", "parts"))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_batches_drawn_ahead_are_those_that_come_anyway(tmp_path: Path) -> None:
    config = small(iterations=6, val_every=2, accumulate=2)

    def trained(name: str, *, ahead: bool, stops: list[int]) -> dict[str, torch.Tensor]:
        for i, stop in enumerate([*stops, 0]):
            run = open_existing(tmp_path / name, config) if i else open_new(tmp_path / name, config)
            trainer, reporter = trainer_for(config, run, build, stop)
            trainer.loop._draws_ahead = ahead  # as on a GPU
            if i:
                trainer.resume()
            trainer.fit(stop=lambda reporter=reporter: reporter.asked)
        return checkpoint.load(tmp_path / name / "checkpoints", "last")[0]

    want = trained("plain", ahead=False, stops=[])
    for name, stops in {"whole": [], "in parts": [1, 3]}.items():
        got = trained(name, ahead=True, stops=stops)
        assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_and_is_judged(tmp_path: Path) -> None:
    config = small(iterations=4, val_every=2, device="cuda")
    run = open_new(tmp_path, config)
    trainer, reporter = trainer_for(config, run, build, 3)
    assert next(trainer.maml.parameters()).is_cuda
    trainer.fit(stop=lambda: reporter.asked)
    again = Trainer(config, build(config), open_existing(tmp_path, config))
    again.resume()
    again.fit()
    assert conclude(run, tasks=6)["step"] in (0, 2, 4)
    maml, *_ = load_learner(tmp_path, "last", device="cpu")
    assert not next(maml.parameters()).is_cuda


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be one that is there \(.*\), got 'cuda:77'; use --device cpu"):
        build(small(device="cuda:77"))
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"):
        small(device="tpu")


def test_records_written_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    config = small(iterations=4, val_every=4)
    trainer, reporter = trainer_for(config, open_new(tmp_path, config), build, 3)
    trainer.fit(stop=lambda: reporter.asked)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "loss": 99}\n{"kind": "tr')
    again = Trainer(config, build(config), open_existing(tmp_path, config))
    again.resume()
    again.fit()
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        ("validation", 0),
        ("train", 2),
        ("train", 4),
        ("validation", 4),
    ]


def test_training_learns(tmp_path: Path) -> None:
    config = small(iterations=150, meta_batch=10, meta_lr=1e-2, val_every=150, val_tasks=50, log_every=50)
    trainer = Trainer(config, build(config), open_new(tmp_path, config))
    trainer.fit()
    first, last = (r["after"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "validation")
    assert last < 0.9 * first  # the network starts at the error of predicting zero


def test_the_best_weights_are_kept_and_tested(tmp_path: Path) -> None:
    config = small(iterations=10, meta_lr=0.5, val_every=2)  # so large a rate that later weights are worse
    run = open_new(tmp_path, config)
    Trainer(config, build(config), run).fit()
    validations = [r for r in read_metrics(run.metrics) if r["kind"] == "validation"]
    best = min(validations, key=lambda r: r["after"])
    assert best["step"] < 10
    record = conclude(run, tasks=6)
    assert record["step"] == best["step"]
    assert record["tasks"] == 6
    assert read_metrics(run.metrics)[-1] == record
    assert run.result.is_file()
    for picture in (run.learning_curve, run.adaptation):
        assert picture.read_bytes().startswith(b"\x89PNG")
    _, _, _, step = load_learner(tmp_path, "last")
    assert step == 10


def test_time_is_a_limit(tmp_path: Path) -> None:
    config = small()
    trainer = Trainer(config, build(config), open_new(tmp_path, config))
    assert trainer.fit(minutes=0.0) == "out of time"
    assert trainer.state.step == 0
    assert checkpoint.load(tmp_path / "checkpoints", "last")[1]["progress"]["validated"] == 0


def test_the_rate_falls_along_half_a_cosine(tmp_path: Path) -> None:
    config = small(meta_lr=1.0, meta_lr_end=0.1, iterations=10)
    trainer = Trainer(config, build(config), open_new(tmp_path, config))
    assert [trainer.meta_lr(s) for s in (0, 5, 10, 11)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_the_meta_gradient_is_clipped(tmp_path: Path) -> None:
    config = small(iterations=1, clip_norm=1e-3)
    trainer = Trainer(config, build(config), open_new(tmp_path, config))
    trainer.fit()
    norm = torch.cat([p.grad.flatten() for p in trainer.problem.model.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm it divides by


def test_accumulated_meta_batches_are_one_meta_step(tmp_path: Path) -> None:
    parts = [Sinusoid(3, 4, seed=seed).sample() for seed in (1, 2)]
    both = [
        tuple(torch.cat(leaves) for leaves in zip(*sets, strict=True)) for sets in zip(*parts_of(parts), strict=True)
    ]

    class Listed(Sinusoid):
        given: list[TaskBatch]

        def sample(self, tasks: int | None = None) -> TaskBatch:
            return self.given.pop(0)

    weights = []
    for name, count, given in (("parts", 2, parts), ("whole", 1, [TaskBatch(*both)])):
        config = small(accumulate=count)
        trainer = Trainer(config, build(config), open_new(tmp_path / name, config))
        trainer.loop.source = source = Listed(3, 4)
        source.given = given
        figures, tasks = trainer.loop._meta_step()
        assert tasks == 6
        weights.append([p.grad for p in trainer.maml.parameters()])
        assert trainer.state.step == 1
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert figures["loss"] > 0


def test_a_diverging_run_says_so(tmp_path: Path) -> None:
    config = small(inner_lr=1e30, val_every=100)
    trainer = Trainer(config, build(config), open_new(tmp_path, config))
    with pytest.raises(ValueError, match=r"must be finite, got .*lower the inner rate"):
        trainer.fit()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    config = small(iterations=1)
    Trainer(config, build(config), open_new(tmp_path, config)).fit()
    tensors, state = checkpoint.load(tmp_path / "checkpoints", "last")
    fresh = Trainer(config, build(config), open_existing(tmp_path, config))
    checkpoint.save(tmp_path / "checkpoints", "last", tensors, {k: v for k, v in state.items() if k != "sampler"})
    with pytest.raises(ValueError, match=r"last\.json must be of this run, got KeyError\('sampler'\)"):
        fresh.resume()
    other = Trainer(config, noisy(config), open_existing(tmp_path, config))
    with pytest.raises(ValueError, match="must fit the model"):
        other.resume()


def test_run_folders_are_guarded(tmp_path: Path) -> None:
    config = small(iterations=1)
    Trainer(config, build(config), open_new(tmp_path / "a", config)).fit()
    with pytest.raises(ValueError, match="holds a run; go on with --resume"):
        open_new(tmp_path / "a", config)
    with pytest.raises(ValueError, match=r"seed must stay 0 when .* is resumed, got 1"):
        open_existing(tmp_path / "a", config.changed(seed=1))
    with pytest.raises(ValueError, match=r"accumulate must stay 1 when .* is resumed, got 2; leave the option out"):
        open_existing(tmp_path / "a", config.changed(accumulate=2))
    assert open_existing(tmp_path / "a", config.changed(iterations=5)).read_config().iterations == 5
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        open_existing(tmp_path / "b", config)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into folder .*choose another output folder"):
        open_new(tmp_path / "file" / "run", config)
    (tmp_path / "a" / "config.json").write_text('{"problem"')
    with pytest.raises(ValueError, match=r"config\.json must hold the settings of a run"):
        Run(tmp_path / "a").read_config()

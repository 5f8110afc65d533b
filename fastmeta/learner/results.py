"""What a finished run is judged by: test figures on unseen classes, and pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastmeta.algorithms.maml import MAML
from fastmeta.core import checks, files
from fastmeta.learner import checkpoint, plots
from fastmeta.learner.algorithms import learner_of, load_weights
from fastmeta.learner.config import TrainConfig
from fastmeta.learner.evaluation import evaluate, evaluation_record
from fastmeta.learner.log import MetricsLog, read_metrics
from fastmeta.learner.problems import Problem, build
from fastmeta.learner.run import BEST, LAST, Run
from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.sinusoid import Sinusoid, grid, wave


def load_learner(
    folder: str | os.PathLike[str], which: str = BEST, **changes: Any
) -> tuple[MAML, Problem, TrainConfig, int]:
    """The learner of a run, with the weights of a checkpoint.

    Args:
        folder: the run's output folder.
        which: ``best`` (by validation) or ``last``.
        changes: settings to replace, such as ``shots`` or ``data``; ``None`` leaves a setting as it is.

    Returns:
        ``(maml, problem, config, step)``.

    Raises:
        FileNotFoundError: no run, or no such checkpoint.
        ValueError: damaged files, or settings that do not fit the weights.
    """
    checks.one_of("eval", "checkpoint", which, (BEST, LAST))
    run = Run(Path(folder))
    config = run.read_config().changed(**changes)
    tensors, stored = checkpoint.load(run.checkpoints, which)
    problem = build(config)
    origin = str(run.checkpoints / f"{which}.json")
    learner = learner_of(config, problem)
    load_weights(learner, tensors, origin)
    try:
        step = int(stored["step"] if which == BEST else stored["progress"]["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {origin} must tell its step, got {error!r}") from error
    return learner, problem, config, step


def judge(
    maml: MAML, problem: Problem, config: TrainConfig, step: int, *, tasks: int = 600, seed: int | None = None
) -> dict[str, Any]:
    """Judge a learner on ``tasks`` tasks of the test classes, as a record for the log.

    Args:
        maml: the learner.
        problem: its problem.
        config: its settings.
        step: meta-steps it was trained for.
        tasks: number of tasks.
        seed: of the task stream; the run's own where left out. The class split is always the run's own.
    """
    found = evaluate(maml, problem.sampler("test", 1, seed), problem.metric, tasks=tasks, steps=config.eval_steps)
    return evaluation_record("test", step, found)


def conclude(run: Run, *, tasks: int = 600) -> dict[str, Any]:
    """Test a run's best checkpoint, append the figures to the log, and write ``result.json`` and the pictures.

    Returns:
        the test record.
    """
    maml, problem, config, step = load_learner(run.folder)
    record = judge(maml, problem, config, step, tasks=tasks)
    with MetricsLog(run.metrics, run.metrics.stat().st_size) as log:
        log.write(record)
    files.write_json(run.result, record)
    draw(run, maml, config)
    return record


def draw(run: Run, maml: MAML, config: TrainConfig) -> list[Path]:
    """Write the run's pictures; returns their paths."""
    plots.learning_curve(read_metrics(run.metrics), run.learning_curve)
    if config.problem != "sinusoid":
        return [run.learning_curve]
    draw_waves(maml, config, run.adaptation)
    return [run.learning_curve, run.adaptation]


def draw_waves(maml: MAML, config: TrainConfig, path: Path, *, tasks: int = 3) -> None:
    """Draw waves the network never saw, with its curve before and after adaptation."""
    sampler = Sinusoid(tasks, config.shots, seed=config.seed + 10)
    waves = sampler.draw()
    xs, ys = sampler.points(*waves, config.shots)
    x = grid()  # [n, 1]
    true = wave(x, *waves)  # [T, n, 1]
    drawn = TaskBatch((xs, ys), (x.to(xs.dtype).expand(tasks, -1, -1), true.to(xs.dtype))).to(config.device)
    with torch.no_grad():
        predictions = {steps: maml(drawn, steps=steps).logits.cpu() for steps in sorted({0, 1, config.eval_steps})}
    plots.sinusoid_adaptation(x, true, (xs, ys), predictions, path)

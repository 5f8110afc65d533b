"""A problem trained in a run folder: the loop with a falling rate, a log, validations and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastmeta.learner import checkpoint
from fastmeta.learner.algorithms import at_step, learner_of, weights_of
from fastmeta.learner.config import TrainConfig
from fastmeta.learner.evaluation import evaluate, evaluation_record
from fastmeta.learner.log import MetricsLog
from fastmeta.learner.loop import Loop, Outcome, Progress, refused
from fastmeta.learner.metric import metric_of
from fastmeta.learner.problems import Problem
from fastmeta.learner.progress import Reporter, Silent
from fastmeta.learner.run import BEST, LAST, Run


@dataclass
class State(Progress):
    """What changes as a run goes on, beside weights, optimizer and task stream.

    Attributes:
        best: metric of the best validation.
        best_step: step of it.
        seconds: time spent in all.
        log_bytes: length of the log.
    """

    best: float | None = None
    best_step: int = -1
    seconds: float = 0.0
    log_bytes: int = 0


class Trainer:
    """Meta-trains a problem's network in a run folder.

    A resumed run gives the numbers of an uninterrupted one, as :class:`~fastmeta.learner.loop.Loop` says; the log is
    cut back to what it was.

    Args:
        config: the settings.
        problem: network, loss and task streams for them.
        run: where checkpoints and log go.
        reporter: is told of the progress.

    Attributes:
        maml: the learner of ``config.algorithm`` around ``problem.model``.
        state: how far the run is.
    """

    def __init__(self, config: TrainConfig, problem: Problem, run: Run, reporter: Reporter | None = None) -> None:
        self.config = config
        self.problem = problem
        self.run = run
        self.reporter = reporter if reporter is not None else Silent()
        self.state = State()
        self.maml = learner_of(config, problem)
        self.loop = Loop(
            self.maml,
            torch.optim.Adam(self.maml.parameters(), lr=config.meta_lr, fused=None if config.device == "cpu" else True),
            problem.sampler("train", config.meta_batch),
            self.state,
            metric=metric_of("accuracy") if problem.metric == "accuracy" else None,
            clip_norm=config.clip_norm,
            accumulate=config.accumulate,
            mend="lower --inner-lr or --meta-lr, or limit the meta-gradient with --clip-norm",
        )
        torch.manual_seed(config.seed)

    def resume(self) -> None:
        """Continue from the run's last checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another model or optimizer.
        """
        tensors, stored = checkpoint.load(self.run.checkpoints, LAST)
        origin = str(self.run.checkpoints / f"{LAST}.json")
        self.loop.restore(tensors, stored, origin)
        with refused(origin):
            self.state = State(**stored["progress"])
        self.loop.progress = self.state

    def fit(self, *, minutes: float | None = None, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train until ``config.iterations``, validating and saving every ``config.val_every`` steps and at the end.

        Args:
            minutes: end earlier after this time, validated and saved.
            stop: asked after every step; where it is true, the run is saved as it is and ends.

        Returns:
            how it ended.

        Raises:
            ValueError: loss or metric are not finite.
            OSError: the run folder cannot be written any more.
        """
        config = self.config
        self.reporter.start(self.state.step, config.iterations)
        try:
            with MetricsLog(self.run.metrics, self.state.log_bytes) as log:
                hooks = _Hooks(self, log, stop)
                return self.loop.run(config.iterations, config.val_every, hooks, minutes=minutes, stop=stop)
        finally:
            self.reporter.stop()

    def meta_lr(self, step: int) -> float:
        """Learning rate of a meta-step: half a cosine from ``meta_lr`` to ``meta_lr_end``."""
        config = self.config
        share = min(1.0, step / config.iterations)
        return config.meta_lr_end + (config.meta_lr - config.meta_lr_end) * 0.5 * (1 + math.cos(math.pi * share))


class _Hooks:
    """What a run does between meta-steps: rates, the log, validations, checkpoints."""

    def __init__(self, trainer: Trainer, log: MetricsLog, stop: Callable[[], bool]) -> None:
        self.trainer, self.log, self.stop = trainer, log, stop
        self._began = time.monotonic() - trainer.state.seconds

    def before_step(self) -> None:
        """Set the rate, and an algorithm's schedules."""
        trainer = self.trainer
        for group in trainer.loop.optimizer.param_groups:
            group["lr"] = trainer.meta_lr(trainer.state.step)
        at_step(trainer.maml, trainer.state.step, trainer.config.iterations)

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Write a training record where one is due."""
        trainer, step = self.trainer, self.trainer.state.step
        if step % trainer.config.log_every == 0:
            record = {"kind": "train", "step": step, **trainer.loop.means(), "meta_lr": trainer.meta_lr(step - 1)}
            record |= {"tasks_per_s": figures["tasks_per_s"], "seconds": time.monotonic() - self._began}
            self.log.write(record)
            trainer.reporter.record({**record, "eta": figures["eta"]})
        trainer.reporter.advance(step, figures)

    def end_epoch(self) -> None:
        """Validate and save; the weights of the best validation are kept beside."""
        trainer, state, config = self.trainer, self.trainer.state, self.trainer.config
        sampler = trainer.problem.sampler("validation", 1)
        found = evaluate(
            trainer.maml,
            sampler,
            trainer.problem.metric,
            tasks=config.val_tasks,
            steps=config.eval_steps,
            stop=self.stop,
        )
        record = evaluation_record("validation", state.step, found) | {"seconds": time.monotonic() - self._began}
        self.log.write(record)
        trainer.reporter.record(record)
        if found.better_than(state.best):
            state.best, state.best_step = found.after.mean, state.step
            checkpoint.save(
                trainer.run.checkpoints, BEST, weights_of(trainer.maml), {"step": state.step, "validation": record}
            )
        self._save()

    def interrupt(self) -> None:
        """Save."""
        self._save()

    def _save(self) -> None:
        trainer, state = self.trainer, self.trainer.state
        state.log_bytes, state.seconds = self.log.size, time.monotonic() - self._began
        tensors, stored = trainer.loop.pack()
        more: dict[str, Any] = {"progress": asdict(state), "config": trainer.config.to_json()}
        checkpoint.save(trainer.run.checkpoints, LAST, tensors, stored | more)

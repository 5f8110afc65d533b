"""The meta-training loop: sample, meta-gradient, Adam; validate, save, and go on exactly where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fastmeta.learner import checkpoint
from fastmeta.learner.algorithms import at_step, learner_of, load_weights, weights_of
from fastmeta.learner.config import TrainConfig
from fastmeta.learner.evaluation import Evaluation, Stopped, evaluate, scores
from fastmeta.learner.metrics import MetricsLog
from fastmeta.learner.problems import Problem
from fastmeta.learner.progress import Reporter, Silent
from fastmeta.learner.run import BEST, LAST, Run

Outcome = Literal["finished", "interrupted", "out of time"]


@dataclass
class State:
    """What changes as a run goes on, beside weights, optimizer and task stream.

    Attributes:
        step: meta-steps done.
        validated: step of the latest validation, -1 before the first.
        best: metric of the best validation.
        best_step: step of it.
        seconds: time spent in all.
        log_bytes: length of the log.
        window: sums since the latest training record, by name, and their ``count``.
    """

    step: int = 0
    validated: int = -1
    best: float | None = None
    best_step: int = -1
    seconds: float = 0.0
    log_bytes: int = 0
    window: dict[str, float] | None = None


class Trainer:
    """Meta-trains a problem's network in a run folder.

    A resumed run gives the numbers of an uninterrupted one, bit for bit where the number of threads is the same:
    weights, optimizer, task stream, PyTorch's generator, the log and the sums of an unfinished record are all restored.

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
        self.optimizer = torch.optim.Adam(self.maml.parameters(), lr=config.meta_lr)
        self.sampler = problem.sampler("train", config.meta_batch)
        torch.manual_seed(config.seed)

    def resume(self) -> None:
        """Continue from the run's last checkpoint.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another model or optimizer.
        """
        tensors, stored = checkpoint.load(self.run.checkpoints, LAST)
        origin = str(self.run.checkpoints / f"{LAST}.json")
        load_weights(self.maml, tensors, origin)
        try:
            checkpoint.unpack_optimizer(self.optimizer, checkpoint.under("optimizer", tensors), stored["optimizer"])
            self.sampler.load_state_dict(stored["sampler"])
            torch.set_rng_state(tensors["generator"])
            self.state = State(**stored["progress"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"checkpoint: {origin} must be of this run, got {error!r}") from error

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
        config, state = self.config, self.state
        started, first, spent = time.monotonic(), state.step, state.seconds
        smooth: dict[str, float] = {}
        self.reporter.start(state.step, config.iterations)
        try:
            with MetricsLog(self.run.metrics, state.log_bytes) as log:
                while True:
                    elapsed = time.monotonic() - started
                    state.seconds = spent + elapsed
                    out_of_time = minutes is not None and elapsed >= 60 * minutes
                    ended = state.step >= config.iterations
                    due = state.step % config.val_every == 0 or ended or out_of_time
                    if due and state.validated != state.step and not stop():
                        self._validate(log, stop)
                        state.seconds = spent + time.monotonic() - started
                    if stop():
                        self._save(log)
                        return "interrupted"
                    if due:
                        self._save(log)
                    if ended or out_of_time:
                        return "finished" if ended else "out of time"
                    before = time.monotonic()
                    figures = self._step()
                    now = time.monotonic()
                    pace = (now - started) / (state.step - first)  # with validations, as the time to go will have them
                    figures["tasks_per_s"] = config.meta_batch * config.accumulate / (now - before)
                    figures["eta"] = pace * (config.iterations - state.step)
                    for name, value in figures.items():
                        smooth[name] = value if name not in smooth else 0.9 * smooth[name] + 0.1 * value
                    self._record(log, smooth, spent + time.monotonic() - started)
                    self.reporter.advance(state.step, smooth)
        finally:
            self.reporter.stop()

    def meta_lr(self, step: int) -> float:
        """Learning rate of a meta-step: half a cosine from ``meta_lr`` to ``meta_lr_end``."""
        config = self.config
        share = min(1.0, step / config.iterations)
        return config.meta_lr_end + (config.meta_lr - config.meta_lr_end) * 0.5 * (1 + math.cos(math.pi * share))

    def _step(self) -> dict[str, float]:
        config, state = self.config, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = self.meta_lr(state.step)
        at_step(self.maml, state.step, config.iterations)
        self.optimizer.zero_grad(set_to_none=True)
        every = [self._backward() for _ in range(config.accumulate)]
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.maml.parameters(), config.clip_norm)
        self.optimizer.step()
        state.step += 1
        figures = {name: sum(each[name] for each in every) / len(every) for name in every[0]}
        if not math.isfinite(figures["loss"]):
            raise ValueError(
                f"train: loss must be finite, got {figures['loss']} at step {state.step}; "
                "lower --inner-lr or --meta-lr, or limit the meta-gradient with --clip-norm"
            )
        window = state.window if state.window is not None else {"count": 0.0}
        window["count"] += 1.0
        for name, value in figures.items():
            window[name] = window.get(name, 0.0) + value
        state.window = window
        return figures

    def _backward(self) -> dict[str, float]:
        """Add one meta-batch's share to the meta-gradient."""
        tasks = self.sampler.sample()
        out = self.maml(tasks)
        (out.loss / self.config.accumulate).backward()
        figures = {"loss": float(out.loss.detach())}
        if self.problem.metric == "accuracy":
            figures["accuracy"] = float(scores("accuracy", out.logits.detach(), tasks.query[1]).mean())
        return figures

    def _record(self, log: MetricsLog, smooth: dict[str, float], seconds: float) -> None:
        state, window = self.state, self.state.window
        if window is None or state.step % self.config.log_every:
            return
        means = {name: total / window["count"] for name, total in window.items() if name != "count"}
        record = {"kind": "train", "step": state.step, **means, "meta_lr": self.meta_lr(state.step - 1)}
        record |= {"tasks_per_s": smooth["tasks_per_s"], "seconds": seconds}
        log.write(record)
        self.reporter.record({**record, "eta": smooth["eta"]})
        state.window = None

    def _validate(self, log: MetricsLog, stop: Callable[[], bool]) -> None:
        config, state = self.config, self.state
        sampler = self.problem.sampler("validation", 1)
        try:
            found = evaluate(
                self.maml, sampler, self.problem.metric, tasks=config.val_tasks, steps=config.eval_steps, stop=stop
            )
        except Stopped:
            return
        record = evaluation_record("validation", state.step, found) | {"seconds": state.seconds}
        log.write(record)
        self.reporter.record(record)
        state.validated = state.step
        if found.better_than(state.best):
            state.best, state.best_step = found.after.mean, state.step
            checkpoint.save(
                self.run.checkpoints, BEST, weights_of(self.maml), {"step": state.step, "validation": record}
            )

    def _save(self, log: MetricsLog) -> None:
        self.state.log_bytes = log.size
        moments, optimizer = checkpoint.pack_optimizer(self.optimizer)
        tensors = (
            weights_of(self.maml) | checkpoint.with_prefix("optimizer", moments) | {"generator": torch.get_rng_state()}
        )
        stored: dict[str, Any] = {
            "progress": asdict(self.state),
            "optimizer": optimizer,
            "sampler": self.sampler.state_dict(),
            "config": self.config.to_json(),
        }
        checkpoint.save(self.run.checkpoints, LAST, tensors, stored)


def evaluation_record(kind: str, step: int, found: Evaluation) -> dict[str, Any]:
    """An evaluation as it goes into the log.

    Raises:
        ValueError: a figure is not finite.
    """
    record: dict[str, Any] = {
        "kind": kind, "step": step, "metric": found.metric, "loss": found.loss, "steps": found.steps,
        "tasks": found.after.tasks, "before": found.before.mean, "before_ci95": found.before.ci95,
        "after": found.after.mean, "after_ci95": found.after.ci95,
    }  # fmt: skip
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{kind}: {name} must be finite, got {value} at step {step}; lower --inner-lr")
    return record

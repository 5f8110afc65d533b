"""The meta-training loop: meta-steps in epochs, which stop when asked and go on exactly where they stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastmeta.algorithms.maml import MAML
from fastmeta.learner import checkpoint
from fastmeta.learner.algorithms import load_weights, weights_of
from fastmeta.learner.evaluation import Stopped
from fastmeta.learner.metric import Metric
from fastmeta.tasks.batch import TaskBatch

Outcome = Literal["finished", "interrupted", "out of time"]


class Source(Protocol):
    """Where the batches of training come from; a :class:`fastmeta.tasks.TaskSampler` is one."""

    def sample(self) -> TaskBatch:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on with the very next batch, as JSON takes it."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken; raises ``ValueError`` where it is no such state."""


class Hooks(Protocol):
    """What is done between meta-steps."""

    def before_step(self) -> None:
        """A meta-step begins."""

    def after_step(self, figures: Mapping[str, float]) -> None:
        """A meta-step is done; ``figures`` are smoothed means: loss, tasks_per_s, eta (seconds), a metric."""

    def end_epoch(self) -> None:
        """An epoch ends, or training does; raises :class:`Stopped` where it was left unfinished."""

    def interrupt(self) -> None:
        """Training was asked to stop, and does."""


@dataclass
class Progress:
    """How far training is.

    Attributes:
        step: meta-steps done.
        validated: step at which an epoch last ended, -1 before the first.
        window: sums of figures since they were last read, and their ``count``.
        stopped: whether a hook has ended training.
    """

    step: int = 0
    validated: int = -1
    window: dict[str, float] | None = None
    stopped: bool = False

    def __post_init__(self) -> None:
        """Check what may come from a file.

        Raises:
            ValueError: values that no training run has.
        """
        whole = all(type(value) is int for value in (self.step, self.validated))
        sums = self.window is None or (
            isinstance(self.window, dict) and all(isinstance(v, float) for v in self.window.values())
        )
        if not whole or not sums or not -1 <= self.validated <= self.step or type(self.stopped) is not bool:
            raise ValueError(f"progress: a step, an epoch's end before it and sums were expected, got {self}")


class Loop:
    """Meta-steps one after the other: sample, meta-gradient, optimizer.

    A restored loop gives the numbers of an uninterrupted one, bit for bit where the number of threads is the same:
    weights, optimizer, source, PyTorch's generators and the sums of an unfinished record are all restored.

    Args:
        learner: what is trained.
        optimizer: over its parameters.
        source: where the batches come from. They are moved to the learner's device.
        progress: how far training is.
        metric: a figure of each meta-step beside the loss; ``None`` for the loss alone.
        clip_norm: largest 2-norm of the meta-gradient, 0 for no limit.
        accumulate: batches of a meta-step, computed one after the other; the meta-gradient is the mean over all tasks.
        mend: what helps where the loss is not finite.
    """

    def __init__(
        self,
        learner: MAML,
        optimizer: torch.optim.Optimizer,
        source: Source,
        progress: Progress,
        *,
        metric: Metric | None = None,
        clip_norm: float = 0.0,
        accumulate: int = 1,
        mend: str = "lower the inner rate or the optimizer's, or limit the meta-gradient with clip_norm",
    ) -> None:
        self.learner = learner
        self.optimizer = optimizer
        self.source = source
        self.progress = progress
        self.metric = metric
        self.clip_norm = clip_norm
        self.accumulate = accumulate
        self.mend = mend
        self._device = next(learner.parameters()).device

    def run(
        self,
        steps: int,
        period: int,
        hooks: Hooks,
        *,
        minutes: float | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Go on until ``steps`` meta-steps are done; an epoch ends after every ``period`` of them, and at the end.

        Args:
            steps: meta-steps in all.
            period: meta-steps of an epoch.
            hooks: are told of what happens.
            minutes: end earlier after this time.
            stop: asked after every meta-step.

        Raises:
            ValueError: a loss that is not finite. Weights are as the meta-step before left them.
        """
        progress = self.progress
        started, first = time.monotonic(), progress.step
        smooth: dict[str, float] = {}
        while True:
            late = minutes is not None and time.monotonic() - started >= 60 * minutes
            due = progress.step % period == 0 or self._ended(steps) or late
            if due and progress.validated != progress.step and not stop():
                before, progress.validated = progress.validated, progress.step
                try:
                    hooks.end_epoch()
                except Stopped:
                    progress.validated = before
            if stop():
                hooks.interrupt()
                return "interrupted"
            if self._ended(steps) or late:
                return "finished" if self._ended(steps) else "out of time"
            began = time.monotonic()
            hooks.before_step()
            figures, tasks = self._meta_step()
            now = time.monotonic()
            pace = (now - started) / (progress.step - first)  # with validations, as the time to go will have them
            figures |= {"tasks_per_s": tasks / (now - began), "eta": pace * (steps - progress.step)}
            for name, value in figures.items():
                smooth[name] = value if name not in smooth else 0.9 * smooth[name] + 0.1 * value
            hooks.after_step(smooth)

    def means(self) -> dict[str, float]:
        """Means of the figures of the meta-steps since the last call; empty where there were none."""
        window, self.progress.window = self.progress.window, None
        if window is None:
            return {}
        return {name: total / window["count"] for name, total in window.items() if name != "count"}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that :meth:`restore` needs but the progress, as ``(tensors, JSON)``."""
        moments, optimizer = checkpoint.pack_optimizer(self.optimizer)
        tensors = weights_of(self.learner) | checkpoint.with_prefix("optimizer", moments)
        tensors["generator"] = torch.get_rng_state()
        if self._device.type == "cuda":
            tensors["cuda_generator"] = torch.cuda.get_rng_state(self._device)
        return tensors, {"optimizer": optimizer, "sampler": self.source.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], stored: Mapping[str, Any], origin: str) -> None:
        """Put back what :meth:`pack` gave.

        Raises:
            ValueError: it is of another model, optimizer or source.
        """
        load_weights(self.learner, tensors, origin)
        with refused(origin):
            checkpoint.unpack_optimizer(self.optimizer, checkpoint.under("optimizer", tensors), stored["optimizer"])
            self.source.load_state_dict(stored["sampler"])
            torch.set_rng_state(tensors["generator"])
            if self._device.type == "cuda" and "cuda_generator" in tensors:
                torch.cuda.set_rng_state(tensors["cuda_generator"], self._device)

    def _ended(self, steps: int) -> bool:
        return self.progress.stopped or self.progress.step >= steps

    def _meta_step(self) -> tuple[dict[str, float], int]:
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self.source.sample() for _ in range(self.accumulate)]
        tasks = sum(len(batch) for batch in batches)
        figures: dict[str, float] = {}
        for batch in batches:
            share = len(batch) / tasks
            for name, value in self._backward(batch.to(self._device), share).items():
                figures[name] = figures.get(name, 0.0) + share * value
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.learner.parameters(), self.clip_norm)
        self.optimizer.step()
        self.progress.step += 1
        window = self.progress.window if self.progress.window is not None else {"count": 0.0}
        window["count"] += 1.0
        for name, value in figures.items():
            window[name] = window.get(name, 0.0) + value
        self.progress.window = window
        return figures, tasks

    def _backward(self, tasks: TaskBatch, share: float) -> dict[str, float]:
        """Add ``share`` of a batch's mean to the meta-gradient; the batch's figures."""
        out = self.learner(tasks)
        figures = {"loss": float(out.loss.detach())}
        if not math.isfinite(figures["loss"]):
            raise ValueError(
                f"train: loss must be finite, got {figures['loss']} at step {self.progress.step + 1}; {self.mend}"
            )
        (share * out.loss).backward()
        if self.metric is not None:
            with torch.no_grad():
                figures[self.metric.name] = float(self.metric.score(out, tasks.query).mean())
        return figures


@contextmanager
def refused(origin: str) -> Iterator[None]:
    """Whatever a state from a foreign file provokes becomes a ``ValueError`` that names the file."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"checkpoint: {origin} must be of this run, got {error!r}") from error

"""A fit of the estimator: epochs over the training loop, with validation, a schedule of rates and callbacks."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.maml_plus_plus import MAMLPlusPlus
from fastmeta.learner import checkpoint
from fastmeta.learner.callbacks import Callback, Checkpoint
from fastmeta.learner.evaluation import Evaluation, evaluation_record
from fastmeta.learner.interrupt import Interrupt
from fastmeta.learner.loop import Loop, Progress, refused
from fastmeta.learner.metric import Metric
from fastmeta.learner.plain import NotPlain, from_plain, to_plain
from fastmeta.learner.progress import Reporter

Validate = Callable[[Callable[[], bool]], Evaluation]


class Fit:
    """A fit that is under way, as callbacks see it.

    Args:
        loop: the training loop.
        epochs: epochs in all.
        period: meta-steps of an epoch.
        metric: what tasks are judged by.
        validate: judges the learner; it is handed a function that says whether to stop. ``None`` for no validation.
        scheduler: changes the optimizer's rate; ``None`` for a rate that stays.
        schedule: whether it moves on after an ``"epoch"`` or a ``"step"``.
        callbacks: are told of what happens, checkpoints after all others.
        reporter: shows the progress.
        export: writes the learner and a history into a folder, ready to be loaded.
        parameters: those of the estimator.

    Attributes:
        history: one record an epoch.
        outcome: how the fit ended.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        epochs: int,
        period: int,
        metric: Metric,
        validate: Validate | None,
        scheduler: LRScheduler | None,
        schedule: str,
        callbacks: Iterable[Callback],
        reporter: Reporter,
        export: Callable[[Path, list[dict[str, Any]]], None],
        parameters: Mapping[str, Any],
    ) -> None:
        self.loop, self.learner, self.optimizer = loop, loop.learner, loop.optimizer
        self.epochs, self.period = epochs, period
        self.metric, self.scheduler, self.schedule = metric, scheduler, schedule
        self.callbacks = sorted(callbacks, key=lambda callback: isinstance(callback, Checkpoint))
        self._export, self.parameters = export, dict(parameters)
        self.history: list[dict[str, Any]] = []
        self.outcome: Literal["finished", "interrupted", "failed"] = "failed"
        self._validate, self._reporter = validate, reporter
        self._seconds = 0.0
        self._began = time.monotonic()
        self._stop: Callable[[], bool] = lambda: False
        self._figures: dict[str, float] = {}

    @property
    def step(self) -> int:
        """Meta-steps done."""
        return self.loop.progress.step

    @property
    def steps(self) -> int:
        """Meta-steps in all."""
        return self.epochs * self.period

    @property
    def epoch(self) -> int:
        """Epochs done, one that ended early included."""
        return math.ceil(self.step / self.period)

    @property
    def stopping(self) -> bool:
        """Whether a callback has ended training."""
        return self.loop.progress.stopped

    def stop(self) -> None:
        """End training after this meta-step; what it ends is an epoch."""
        self.loop.progress.stopped = True

    def export(self, folder: Path) -> None:
        """Write the learner as it is into a folder, ready to be loaded."""
        self._export(folder, self.history)

    def run(self) -> int:
        """Train to the end.

        Returns:
            the number of the signal that interrupted it, 0 if none did. Without a :class:`Checkpoint` among the
            callbacks signals take their usual course.
        """
        saves = any(isinstance(callback, Checkpoint) for callback in self.callbacks)
        started: list[Callback] = []
        self._began = time.monotonic() - self._seconds
        self._reporter.start(self.step, self.steps)
        try:
            for callback in self.callbacks:
                callback.on_fit_start(self)
                started.append(callback)
            with Interrupt() if saves else nullcontext() as signal:
                self._stop = lambda: signal is not None and signal.requested
                outcome = self.loop.run(self.steps, self.period, self, stop=self._stop)
            self.outcome = "interrupted" if outcome == "interrupted" else "finished"
            return signal.signal if signal is not None else 0
        finally:
            self._reporter.stop()
            for callback in started:
                callback.on_fit_end(self)

    def save(self, folder: str | os.PathLike[str], name: str) -> None:
        """Write everything that :meth:`resume` needs as checkpoint ``name``."""
        tensors, stored = self.loop.pack()
        states = []
        for number, callback in enumerate(self.callbacks):
            state = callback.state_dict()
            held = {n: v for n, v in state.items() if isinstance(v, Tensor)}
            tensors |= checkpoint.with_prefix(f"callback.{number}", held)
            plain = to_plain({n: v for n, v in state.items() if n not in held})
            states.append({"name": type(callback).__name__, "state": plain})
        stored |= {
            "kind": "fit",
            "period": self.period,
            "settings": self._settings(),
            "progress": asdict(self.loop.progress),
            "scheduler": None if self.scheduler is None else pack_scheduler(self.scheduler),
            "callbacks": states,
            "history": self.history,
            "seconds": time.monotonic() - self._began,
        }
        checkpoint.save(folder, name, tensors, stored)

    def resume(self, folder: str | os.PathLike[str], name: str) -> None:
        """Put back what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged, or of another model, optimizer, source, schedule, list of callbacks, number of
                batches a meta-step or limit of the meta-gradient.
        """
        tensors, stored = checkpoint.load(folder, name)
        origin = str(Path(folder) / f"{name}.json")
        with refused(origin):
            if stored["kind"] != "fit" or stored["period"] != self.period:
                raise ValueError(f"a fit with epochs of {self.period} meta-steps was expected")
            for setting, got in self._settings().items():
                if (stay := stored["settings"][setting]) != got:
                    raise ValueError(
                        f"{setting} must stay {stay!r}, got {got!r}; give {setting}={stay!r}, or begin a new fit"
                    )
            if (stored["scheduler"] is None) != (self.scheduler is None):
                raise ValueError("a scheduler must be given where the checkpoint has one, and only there")
            names = [type(callback).__name__ for callback in self.callbacks]
            if [entry["name"] for entry in stored["callbacks"]] != names:
                raise ValueError(f"callbacks must be {[e['name'] for e in stored['callbacks']]} as there, got {names}")
            progress = Progress(**stored["progress"])
            history, seconds = [dict(record) for record in stored["history"]], float(stored["seconds"])
        self.loop.restore(tensors, stored, origin)
        with refused(origin):
            if self.scheduler is not None:
                unpack_scheduler(self.scheduler, stored["scheduler"])
            for number, (callback, entry) in enumerate(zip(self.callbacks, stored["callbacks"], strict=True)):
                callback.load_state_dict(from_plain(entry["state"]) | checkpoint.under(f"callback.{number}", tensors))
        self.loop.progress, self.history, self._seconds = progress, history, seconds

    def _settings(self) -> dict[str, Any]:
        """Those that a resumed fit must have again and that nothing else tells."""
        return {"accumulate": self.loop.accumulate, "clip_norm": self.loop.clip_norm, "schedule": self.schedule}

    def before_step(self) -> None:
        """Tell an algorithm that has schedules which epoch it is."""
        if isinstance(self.learner, MAMLPlusPlus):
            self.learner.epoch = self.step // self.period

    def after_step(self, figures: Mapping[str, float]) -> None:
        """Move the schedule on, and tell of it."""
        self._figures = dict(figures)
        if self.scheduler is not None and self.schedule == "step":
            self.scheduler.step()
        self._reporter.advance(self.step, figures)
        for callback in self.callbacks:
            callback.on_step_end(self, figures)

    def end_epoch(self) -> None:
        """Validate, move the schedule on, and keep a record."""
        found = None if self._validate is None else self._validate(self._stop)
        record: dict[str, Any] = {"epoch": self.epoch, "step": self.step, **self.loop.means()}
        record["meta_lr"] = float(self.optimizer.param_groups[0]["lr"])
        record["tasks_per_s"] = self._figures.get("tasks_per_s", 0.0)
        record["seconds"] = time.monotonic() - self._began
        self._reporter.record({**record, "kind": "train", "eta": self._figures.get("eta", 0.0)})
        if found is not None:
            judged = evaluation_record("validation", self.step, found)
            record |= {"validation": judged["after"], "validation_ci95": judged["after_ci95"]}
            record |= {"validation_before": judged["before"], "validation_before_ci95": judged["before_ci95"]}
            record["validation_loss"] = judged["loss"]
            self._reporter.record(judged)
        if self.scheduler is not None and self.schedule == "epoch":
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(record.get("validation", record["loss"]))
            else:
                self.scheduler.step()
        self.history.append(record)
        for callback in self.callbacks:
            callback.on_epoch_end(self, record)

    def interrupt(self) -> None:
        """Nothing: :class:`Checkpoint` saves at the end."""


def pack_scheduler(scheduler: LRScheduler) -> dict[str, Any]:
    """State of any scheduler of ``torch.optim`` in JSON. Functions are left out: the next one has its own.

    Raises:
        ValueError: the state holds something else that JSON has no form for.
    """
    packed = {}
    for name, value in scheduler.state_dict().items():
        if not callable(value):
            try:
                packed[name] = to_plain(value)
            except NotPlain as error:
                raise ValueError(
                    f"fit: {name} of {type(scheduler).__name__} must be numbers to be saved, got {error}"
                ) from error
    return packed


def unpack_scheduler(scheduler: LRScheduler, stored: Mapping[str, Any]) -> None:
    """Put back what :func:`pack_scheduler` gave.

    Raises:
        ValueError: it is of another kind of scheduler.
    """
    own = scheduler.state_dict()
    taken = {name: from_plain(value) for name, value in stored.items()}
    expected = {name for name, value in own.items() if not callable(value)}
    if taken.keys() != expected:
        raise ValueError(f"the state of a {type(scheduler).__name__} was expected")
    # what is the same stays the object it is: counters, for one, come back as plain mappings
    scheduler.load_state_dict(
        {name: taken[name] if name in taken and taken[name] != v else v for name, v in own.items()}
    )


def optimizer_for(learner: MAML, optimizer: str | Callable[..., torch.optim.Optimizer], lr: float | None) -> Any:
    """The optimizer of the outer loop.

    Args:
        learner: what it changes.
        optimizer: name of a class of ``torch.optim``, or what is called with the parameters.
        lr: its rate; its own default where ``None``.

    Raises:
        TypeError: neither, or what is called gives no optimizer.
        ValueError: an unknown name.
    """
    expected = "a name of torch.optim, a class, or a function of the parameters"
    make: Any = optimizer
    if isinstance(optimizer, str):
        make = getattr(torch.optim, optimizer, None)
        if not isinstance(make, type) or not issubclass(make, torch.optim.Optimizer):
            raise ValueError(f"MetaLearner: optimizer must be {expected}, got {optimizer!r}")
    if not callable(make):
        mend = "an optimizer belongs to the parameters it was made for, and a fit trains a copy"
        raise TypeError(f"MetaLearner: optimizer must be {expected}, got {type(make).__name__}; {mend}")
    made = make(learner.parameters()) if lr is None else make(learner.parameters(), lr=lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"MetaLearner: optimizer must make a torch.optim.Optimizer, got {type(made).__name__}")
    return made

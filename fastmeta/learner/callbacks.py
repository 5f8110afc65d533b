"""What is done while a fit goes on: the protocol, stopping early, and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmeta.core import checks, files

if TYPE_CHECKING:
    from fastmeta.learner.fit import Fit


class Callback:
    """Is told of a fit's progress; the methods of this class do nothing.

    What a callback knows of earlier epochs belongs into ``state_dict``, so that a resumed fit goes on as if it had not
    been interrupted. ``fit`` has ``step``, ``epoch``, ``epochs``, ``learner`` (the algorithm, with the model in it),
    ``optimizer``, ``metric``, ``history`` and ``stop()``.
    """

    def on_fit_start(self, fit: Fit) -> None:
        """Training starts, or goes on where ``fit.step`` is not 0."""

    def on_step_end(self, fit: Fit, figures: Mapping[str, float]) -> None:
        """A meta-step is done; ``figures`` are smoothed means: ``loss``, ``tasks_per_s``, ``eta`` and a metric."""

    def on_epoch_end(self, fit: Fit, record: Mapping[str, Any]) -> None:
        """An epoch is done; ``record`` is the last of ``fit.history``."""

    def on_fit_end(self, fit: Fit) -> None:
        """Training is over; ``fit.outcome`` is ``"finished"``, ``"interrupted"`` or ``"failed"``."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs: JSON, and tensors by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""


class Best:
    """The best value of a figure so far.

    Args:
        monitor: the figure's name in the record of an epoch; ``None`` for the validation, or the loss without one.
        larger: whether larger is better; ``None`` for what is known of the metric, else no.
        least: by how much a value must be better.
    """

    def __init__(self, monitor: str | None = None, larger: bool | None = None, least: float = 0.0) -> None:
        self.monitor, self.larger, self.least = monitor, larger, least
        self.value: float | None = None

    def improved(self, fit: Fit, record: Mapping[str, Any]) -> bool:
        """Whether the record has a new best value, which is then kept.

        Raises:
            ValueError: the record has no such figure.
        """
        name = self.monitor or ("validation" if "validation" in record else "loss")
        if not isinstance(record.get(name), (int, float)):
            checks.fail(ValueError, "fit", "monitor", f"a figure of an epoch, of {[*record]}", repr(name))
        value = float(record[name])
        of_metric = name in ("validation", "validation_before", fit.metric.name)
        larger = (of_metric and fit.metric.larger) if self.larger is None else self.larger
        gain = 0.0 if self.value is None else (value - self.value if larger else self.value - value)
        if self.value is None or gain > self.least:
            self.value = value
            return True
        return False


class EarlyStopping(Callback):
    """Ends a fit after ``patience`` epochs without a better figure.

    Args:
        patience: epochs.
        monitor: name of a figure in the records of epochs; the validation, or the loss without one, if left out.
        least: by how much a figure must be better to count.
        larger: whether larger is better; known for the metric, and no for others, if left out.
        restore: put the weights of the best epoch back at the end.

    Raises:
        ValueError: ``patience`` below 1, or a negative ``least``.
    """

    def __init__(
        self,
        patience: int = 5,
        *,
        monitor: str | None = None,
        least: float = 0.0,
        larger: bool | None = None,
        restore: bool = True,
    ) -> None:
        checks.at_least("EarlyStopping", "patience", patience, 1)
        checks.at_least("EarlyStopping", "least", least, 0)
        self.patience, self.restore = patience, restore
        self.monitor, self.least, self.larger = monitor, least, larger
        self._weights: dict[str, Any] = {}
        self._forget()

    def on_fit_start(self, fit: Fit) -> None:
        """Forget an earlier fit."""
        if fit.step == 0:
            self._forget()

    def on_epoch_end(self, fit: Fit, record: Mapping[str, Any]) -> None:
        """Count, and stop."""
        if self._best.improved(fit, record):
            self._waited = 0
            if self.restore:
                self._weights = {n: t.detach().clone() for n, t in fit.learner.state_dict().items()}
        else:
            self._waited += 1
        if self._waited >= self.patience:
            fit.stop()

    def on_fit_end(self, fit: Fit) -> None:
        """Put the best weights back."""
        if self._weights and fit.outcome == "finished":
            fit.learner.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """The best figure, the count and the best weights."""
        return {"best": self._best.value, "waited": self._waited, **self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._forget()
        self._best.value, self._waited = state["best"], int(state["waited"])
        self._weights |= {n: t for n, t in state.items() if n not in ("best", "waited")}

    def _forget(self) -> None:
        self._best = Best(self.monitor, self.larger, self.least)
        self._waited = 0
        self._weights = {}


class Checkpoint(Callback):
    """Writes what ``fit(..., resume=folder)`` goes on from, and the best learner.

    ``last.json`` and its tensors hold everything of the fit; the folder ``best`` holds what
    :meth:`fastmeta.MetaLearner.load` reads. Each is replaced in one step. Ctrl-C (or SIGTERM) lets the meta-step in
    hand finish, and writes ``last`` before the fit ends.

    Args:
        folder: where; made if need be.
        every: epochs between two writings of ``last``; the last epoch is written too.
        best: whether the best learner is kept.
        monitor: by what, as :class:`EarlyStopping` has it.
        larger: whether larger is better, as there.

    Raises:
        OSError: the folder cannot be written.
        ValueError: ``every`` below 1.
    """

    LAST, BEST = "last", "best"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        best: bool = True,
        monitor: str | None = None,
        larger: bool | None = None,
    ) -> None:
        checks.at_least("Checkpoint", "every", every, 1)
        self.folder = files.make_folder(Path(folder))
        self.every, self.best, self.monitor, self.larger = every, best, monitor, larger
        self._best = Best(monitor, larger)

    def on_fit_start(self, fit: Fit) -> None:
        """Forget an earlier fit."""
        if fit.step == 0:
            self._best = Best(self.monitor, self.larger)

    def on_epoch_end(self, fit: Fit, record: Mapping[str, Any]) -> None:
        """Write."""
        if self.best and self._best.improved(fit, record):
            fit.export(self.folder / self.BEST)
        if fit.epoch % self.every == 0 or fit.step == fit.steps or fit.stopping:
            fit.save(self.folder, self.LAST)

    def on_fit_end(self, fit: Fit) -> None:
        """Write what was left unfinished."""
        if fit.outcome == "interrupted":
            fit.save(self.folder, self.LAST)

    def state_dict(self) -> dict[str, Any]:
        """The best figure."""
        return {"best": self._best.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        self._best = Best(self.monitor, self.larger)
        self._best.value = state["best"]

"""A fit's figures in TensorBoard and MLflow, by their own libraries."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastmeta.learner.callbacks import Callback

if TYPE_CHECKING:
    from fastmeta.learner.fit import Fit

ENDS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}  # how a fit ends, in MLflow's words


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record, without the place it is of."""
    kept = {n: v for n, v in record.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {name: float(value) for name, value in kept.items() if name not in ("epoch", "step", "eta")}


class TensorBoard(Callback):
    """Writes figures for TensorBoard: under ``epoch/`` those of each epoch, under ``step/`` those of meta-steps.

    Args:
        folder: where the event files go.
        every: meta-steps between two points under ``step/``; 0 for none.

    Raises:
        ImportError: the package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int = 10) -> None:
        self._writer = _library("TensorBoard", "torch.utils.tensorboard", "tensorboard").SummaryWriter
        self.folder, self.every = folder, every
        self._open: Any = None

    def on_fit_start(self, fit: Fit) -> None:
        """Open the file; points that an interrupted fit wrote after its checkpoint are taken back."""
        self._open = self._writer(os.fspath(self.folder), purge_step=fit.step + 1 if fit.step else None)

    def on_step_end(self, fit: Fit, figures: Mapping[str, float]) -> None:
        """Write now and then."""
        if self.every and fit.step % self.every == 0:
            self._write("step", figures, fit.step)

    def on_epoch_end(self, fit: Fit, record: Mapping[str, Any]) -> None:
        """Write the record."""
        self._write("epoch", record, fit.step)

    def on_fit_end(self, fit: Fit) -> None:
        """Close the file."""
        self._open.close()

    def _write(self, kind: str, record: Mapping[str, Any], step: int) -> None:
        for name, value in numbers(record).items():
            self._open.add_scalar(f"{kind}/{name}", value, step)


class MLflow(Callback):
    """Writes the parameters of the estimator and the figures of each epoch as a run of MLflow.

    A resumed fit goes on in the run it began in.

    Args:
        experiment: name of the experiment, which is made if need be.
        run: name of the run; MLflow's choice where left out.
        uri: where the runs are; MLflow's own setting where left out.

    Raises:
        ImportError: the package ``mlflow`` is not installed.
    """

    def __init__(self, experiment: str = "fastmeta", *, run: str | None = None, uri: str | None = None) -> None:
        self._client = _library("MLflow", "mlflow", "mlflow").MlflowClient(tracking_uri=uri)
        self.experiment, self.run = experiment, run
        self.run_id: str | None = None

    def on_fit_start(self, fit: Fit) -> None:
        """Begin a run, or go on with one."""
        if fit.step and self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self.run_id = self._client.create_run(experiment, run_name=self.run).info.run_id
        for name, value in fit.parameters.items():
            self._client.log_param(self.run_id, name, str(value)[:500])

    def on_epoch_end(self, fit: Fit, record: Mapping[str, Any]) -> None:
        """Write the record."""
        for name, value in numbers(record).items():
            self._client.log_metric(self.run_id, name, value, step=fit.step)

    def on_fit_end(self, fit: Fit) -> None:
        """End the run."""
        self._client.set_terminated(self.run_id, status=ENDS[fit.outcome])

    def state_dict(self) -> dict[str, Any]:
        """Which run it is."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that run."""
        self.run_id = state["run_id"]


def _library(callback: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{callback}: the package {package} must be installed, got {error}; pip install 'fastmeta[{package}]'"
        ) from error

"""Figures in TensorBoard and MLflow, if they are installed; a helpful message if not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import nn

from fastmeta.learner.callbacks import Callback, Checkpoint
from fastmeta.learner.estimator import MetaLearner
from fastmeta.learner.fit import Fit
from fastmeta.learner.loggers import MLflow, TensorBoard, numbers
from fastmeta.tasks import Sinusoid


def fit(callbacks: list[Callback], epochs: int = 2, resume: Path | None = None) -> MetaLearner:
    learner = MetaLearner(
        nn.Linear(1, 1), "maml", F.mse_loss, metric="mse", verbose=False, options={"engine": "autodiff"}
    )
    settings: dict[str, Any] = {"validation": Sinusoid(2, 4, seed=1), "validation_tasks": 2, "resume": resume}
    return learner.fit(Sinusoid(2, 4), epochs=epochs, steps_per_epoch=4, callbacks=callbacks, **settings)


class Stops(Callback):
    def on_step_end(self, fit: Fit, figures: object) -> None:
        raise RuntimeError("here")


def test_what_is_written_of_a_record() -> None:
    record = {"epoch": 1, "step": 3, "loss": 0.5, "eta": 2.0, "count": 3, "metric": "mse", "done": True}
    assert numbers(record) == {"loss": 0.5, "count": 3.0}


@pytest.mark.parametrize(
    ("callback", "module", "package"),
    [(TensorBoard, "torch.utils.tensorboard", "tensorboard"), (MLflow, "mlflow", "mlflow")],
)
def test_a_missing_library_is_named(monkeypatch: Any, callback: Callable[..., Any], module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package} must be installed, got .*pip install 'fastmeta\[{package}\]'"):
        callback("somewhere")


class Writer:
    """Notes what TensorBoard's writer is asked for."""

    made: list[Writer] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.points: list[tuple[str, float, int]] = []
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.points.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_is_handed_every_epoch(monkeypatch: Any, tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made.clear()
    board = TensorBoard("somewhere", every=2)
    learner = fit([board, Checkpoint(tmp_path)])
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == ("somewhere", None, True)
    losses = [(v, s) for n, v, s in writer.points if n == "epoch/loss"]
    assert losses == [(r["loss"], r["step"]) for r in learner.history_]
    assert [(v, s) for n, v, s in writer.points if n == "epoch/validation"] == [
        (r["validation"], r["step"]) for r in learner.history_
    ]
    assert [s for n, _, s in writer.points if n == "step/loss"] == [2, 4, 6, 8]
    fit([board, Checkpoint(tmp_path)], 3, resume=tmp_path)
    assert Writer.made[1].purge_step == 9
    with pytest.raises(RuntimeError, match="here"):
        fit([board, Stops()])
    assert Writer.made[2].closed


class Client:
    """Notes what MLflow's client is asked for."""

    def __init__(self, tracking_uri: str | None) -> None:
        self.uri, self.runs, self.calls = tracking_uri, 0, []
        self.experiments: dict[str, str] = {}

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return None if found is None else SimpleNamespace(experiment_id=found)

    def create_experiment(self, name: str) -> str:
        return self.experiments.setdefault(name, f"e{len(self.experiments)}")

    def create_run(self, experiment: str, run_name: str | None) -> Any:
        self.runs += 1
        return SimpleNamespace(info=SimpleNamespace(run_id=f"{experiment}r{self.runs}"))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **more: self.calls.append((name, *values, *more.values()))


def test_mlflow_is_handed_parameters_and_every_epoch(monkeypatch: Any, tmp_path: Path) -> None:
    module = ModuleType("mlflow")
    module.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    flow = MLflow("mine", run="first", uri="somewhere")
    learner = fit([flow, Checkpoint(tmp_path)])
    client = flow._client
    assert client.uri == "somewhere"
    assert ("log_param", "e0r1", "metric", "mse") in client.calls
    losses = [c[1:] for c in client.calls if c[:3] == ("log_metric", "e0r1", "loss")]
    assert losses == [("e0r1", "loss", r["loss"], r["step"]) for r in learner.history_]
    assert client.calls[-1] == ("set_terminated", "e0r1", "FINISHED")
    client.calls.clear()
    fit([flow, Checkpoint(tmp_path)], 3, resume=tmp_path)  # goes on in the same run
    assert client.runs == 1
    assert client.calls[0] == ("update_run", "e0r1", "RUNNING")
    assert [c[4] for c in client.calls if c[:3] == ("log_metric", "e0r1", "loss")] == [12]
    with pytest.raises(RuntimeError, match="here"):
        fit([flow, Stops()])
    assert client.runs == 2
    assert client.calls[-1] == ("set_terminated", "e0r2", "FAILED")


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learner = fit([TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = events.Scalars("epoch/validation")
    assert [(p.step, pytest.approx(p.value)) for p in points] == [
        (r["step"], r["validation"]) for r in learner.history_
    ]


def test_mlflow_itself(tmp_path: Path, monkeypatch: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path / 'runs.db'}" if _has_sqlalchemy() else (tmp_path / "runs").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    flow = MLflow("mine", uri=uri)
    learner = fit([flow])
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(flow.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["metric"] == "mse"
    history = client.get_metric_history(flow.run_id, "validation")
    assert [(m.step, m.value) for m in history] == [(r["step"], r["validation"]) for r in learner.history_]


def _has_sqlalchemy() -> bool:
    try:
        import sqlalchemy  # noqa: F401
    except ImportError:
        return False
    return True

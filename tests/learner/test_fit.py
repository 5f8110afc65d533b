"""A fit that is interrupted goes on exactly; callbacks and checkpoints."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import fastmeta as fm
from fastmeta.learner.callbacks import Callback, Checkpoint, EarlyStopping
from fastmeta.learner.estimator import MetaLearner
from fastmeta.learner.fit import Fit, pack_scheduler, unpack_scheduler
from fastmeta.learner.plain import NotPlain, from_plain, to_plain
from fastmeta.tasks import Sinusoid

CLOCKS = ("seconds", "tasks_per_s")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Sums in one order."""


def noisy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def learner(**changes: Any) -> MetaLearner:
    settings = {"inner_lr": 0.05, "meta_lr": 1e-2, "random_state": 0, "verbose": False, "metric": "mse"}
    settings["options"] = {"engine": "autodiff"}  # spares small tests the time of tracing
    return MetaLearner(noisy(), "maml", "mse_loss", **settings | changes)


def one_by_one(seed: int = 3) -> list[Any]:
    drawn = Sinusoid(1, 4, seed=seed)
    return [drawn.sample().task(0) for _ in range(7)]


def weights(fitted: MetaLearner) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in fitted.learner_.state_dict().items()}


def figures(fitted: MetaLearner) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in fitted.history_]


class Signal(Callback):
    """Sends this process a signal after a meta-step, as Ctrl-C would."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_end(self, fit: Fit, figures: object) -> None:
        if fit.step == self.step:
            os.kill(os.getpid(), self.number)


SOURCES = {
    "sampler": lambda: Sinusoid(3, 4, seed=1),
    "loader": lambda: DataLoader(one_by_one(), 2, shuffle=True, collate_fn=fm.TaskBatch.stack),
}


@pytest.mark.parametrize(("source", "accumulate"), [("sampler", 1), ("loader", 1), ("loader", 3)])
def test_an_interrupted_fit_goes_on_as_if_it_had_not_been(tmp_path: Path, source: str, accumulate: int) -> None:
    plateau = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, mode="max")

    def fit(stop: int, resume: Path | None = None) -> MetaLearner:
        folder = tmp_path / ("parts" if stop or resume else "whole")
        callbacks = [Checkpoint(folder), EarlyStopping(2, larger=True), Signal(stop)]  # the error falls: stops early
        engine = {"engine": "program" if source == "sampler" else "autodiff"}
        made = learner(scheduler=plateau, options=engine, accumulate=accumulate)
        settings = {"validation": Sinusoid(1, 4, seed=9), "validation_tasks": 3, "steps_per_epoch": 4}
        try:
            return made.fit(SOURCES[source](), epochs=9, callbacks=callbacks, resume=resume, **settings)
        except KeyboardInterrupt:
            assert made.n_steps_ == stop
            return made

    whole = fit(0)
    assert 8 <= whole.n_steps_ < 36  # stopped early, so that the restored callbacks matter
    fit(2)
    torch.manual_seed(99)  # a new process would start with another state
    fit(6, tmp_path / "parts")
    parts = fit(0, tmp_path / "parts")
    assert figures(parts) == figures(whole)
    assert parts.n_steps_ == whole.n_steps_
    one, two = weights(whole), weights(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    best = [MetaLearner.load(tmp_path / run / "best", noisy(), scheduler=None) for run in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*[weights(b).values() for b in best], strict=True))


def test_more_epochs_of_a_finished_fit(tmp_path: Path) -> None:
    def fit(epochs: int, folder: Path, **more: Any) -> dict[str, Tensor]:
        callbacks = [Checkpoint(folder, every=2)]
        return weights(
            learner().fit(Sinusoid(3, 4, seed=1), epochs=epochs, steps_per_epoch=2, callbacks=callbacks, **more)
        )

    fit(3, tmp_path / "a")
    once = fit(3, tmp_path / "a", resume=tmp_path / "a")
    more = fit(5, tmp_path / "a", resume=tmp_path / "a")
    whole = fit(5, tmp_path / "b")
    assert all(torch.equal(more[n], whole[n]) for n in whole)
    assert not all(torch.equal(more[n], once[n]) for n in whole)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Python's own handler, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_signals(tmp_path: Path) -> None:
    usual = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        learner().fit(Sinusoid(3, 4), steps_per_epoch=4, callbacks=[Signal(2, signal.SIGTERM), Checkpoint(tmp_path)])
    assert left.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is usual
    assert json.loads((tmp_path / "last.json").read_text())["state"]["progress"]["step"] == 2
    with pytest.raises(KeyboardInterrupt):  # at once, for there is nothing to be saved
        learner().fit(Sinusoid(3, 4), steps_per_epoch=4, callbacks=[Signal(2)])


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_fit_start(self, fit: Fit) -> None:
        self.seen.append("start")

    def on_step_end(self, fit: Fit, figures: Any) -> None:
        assert {"loss", "tasks_per_s", "eta", "mse"} <= figures.keys()
        self.seen.append(f"step {fit.step}")

    def on_epoch_end(self, fit: Fit, record: Any) -> None:
        assert fit.history[-1] is record
        self.seen.append(f"epoch {fit.epoch}")
        if fit.epoch == 2:
            fit.stop()

    def on_fit_end(self, fit: Fit) -> None:
        self.seen.append(fit.outcome)


class Fails(Callback):
    def on_step_end(self, fit: Fit, figures: object) -> None:
        raise RuntimeError("no")


def test_callbacks_are_told_in_order() -> None:
    events = Events()
    fitted = learner().fit(Sinusoid(2, 4), epochs=9, steps_per_epoch=2, callbacks=[events])
    assert events.seen == ["start", "step 1", "step 2", "epoch 1", "step 3", "step 4", "epoch 2", "finished"]
    assert fitted.n_steps_ == 4
    events = Events()
    with pytest.raises(RuntimeError, match="no"):
        learner().fit(Sinusoid(2, 4), steps_per_epoch=2, callbacks=[events, Fails()])
    assert events.seen == ["start", "step 1", "failed"]


class Figure(Callback):
    """A figure of one's own in the record of each epoch."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_epoch_end(self, fit: Fit, record: dict[str, Any]) -> None:
        record["figure"] = self.values[fit.epoch - 1]


class Weights(Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_epoch_end(self, fit: Fit, record: Any) -> None:
        self.seen.append(fit.learner.model[0].weight.detach().clone())


@pytest.mark.parametrize(
    ("options", "stops", "best"),
    [
        ({"larger": True}, 4, 2),
        ({"larger": True, "restore": False}, 4, None),
        ({}, 3, 1),
        ({"larger": True, "least": 2.5}, 5, 3),
        ({"larger": True, "patience": 9}, 6, 2),
    ],
)
def test_early_stopping(options: dict[str, Any], stops: int, best: int | None, tmp_path: Path) -> None:
    seen, stop = Weights(), EarlyStopping(**{"patience": 2, "monitor": "figure"} | options)
    callbacks = [Figure([1.0, 3.0, 2.0, 3.0, 2.9, 2.8] if "least" not in options else [1, 3, 4, 4, 4, 4]), stop, seen]
    fitted = learner().fit(Sinusoid(2, 4), epochs=6, steps_per_epoch=1, callbacks=callbacks)
    assert len(seen.seen) == stops
    kept = seen.seen[-1 if best is None else best - 1]
    assert torch.equal(fitted.model_[0].weight, kept)
    with pytest.raises(ValueError, match=r"monitor must be a figure of an epoch, of \['epoch', .*got 'f1'"):
        learner().fit(Sinusoid(2, 4), steps_per_epoch=1, callbacks=[EarlyStopping(monitor="f1")])
    with pytest.raises(ValueError, match="patience must be at least 1"):
        EarlyStopping(0)


def test_the_best_learner_is_kept_and_loads(tmp_path: Path) -> None:
    seen = Weights()
    callbacks = [Checkpoint(tmp_path, monitor="figure"), Figure([3.0, 1.0, 2.0]), seen]
    learner().fit(Sinusoid(2, 4), epochs=3, steps_per_epoch=1, callbacks=callbacks)
    best = MetaLearner.load(tmp_path / "best", noisy())
    assert torch.equal(best.model_[0].weight, seen.seen[1])
    assert [r["figure"] for r in best.history_] == [3.0, 1.0]


def fitted_with(folder: Path, source: Any = None, **changes: Any) -> Callable[..., MetaLearner]:
    def fit(resume: Path | None = None, **more: Any) -> MetaLearner:
        settings = {"epochs": 2, "steps_per_epoch": 2, "callbacks": [Checkpoint(folder)]} | more
        return learner(**changes).fit(Sinusoid(2, 4) if source is None else source, resume=resume, **settings)

    return fit


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    fit = fitted_with(tmp_path / "a")
    fit()
    with pytest.raises(FileNotFoundError, match=r"there is no .*last\.json"):
        fit(tmp_path / "b")
    for attempt, message in [
        (functools.partial(fit, steps_per_epoch=3), "epochs of 3 meta-steps"),
        (
            functools.partial(fitted_with(tmp_path / "a", accumulate=3), steps_per_epoch=2),
            r"last\.json must be of this run, .*accumulate must stay 1, got 3; give accumulate=1, or begin a new fit",
        ),
        (functools.partial(fitted_with(tmp_path / "a", clip_norm=2.0)), r"clip_norm must stay 0\.0, got 2\.0"),
        (functools.partial(fitted_with(tmp_path / "a", schedule="step")), "schedule must stay 'epoch', got 'step'"),
        (functools.partial(fit, callbacks=[]), r"callbacks must be \['Checkpoint'\] as there, got \[\]"),
        (functools.partial(fitted_with(tmp_path / "a", one_by_one())), "state must come from state_dict"),
        (functools.partial(fitted_with(tmp_path / "a", [Sinusoid(2, 4).sample()])), "KeyError"),
        (functools.partial(fitted_with(tmp_path / "a", optimizer="SGD", scheduler=halving)), "scheduler must be given"),
    ]:
        with pytest.raises(ValueError, match=message):
            attempt(resume=tmp_path / "a")
    other = MetaLearner(nn.Linear(1, 1), "maml", "mse_loss", verbose=False)
    with pytest.raises(ValueError, match=r"last\.json must fit the model"):
        other.fit(
            Sinusoid(2, 4), epochs=2, steps_per_epoch=2, callbacks=[Checkpoint(tmp_path / "b")], resume=tmp_path / "a"
        )
    assert not hasattr(other, "learner_")


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no progress": lambda state: state.pop("progress"),
    "a step that is text": lambda state: state["progress"].update(step="4"),
    "a step before the start": lambda state: state["progress"].update(step=-3),
    "more progress than there is": lambda state: state["progress"].update(speed=1),
    "optimizer": lambda state: state.update(optimizer=[]),
    "groups": lambda state: state["optimizer"].update(groups=[]),
    "sampler": lambda state: state.update(sampler={"generator": {"state": "x"}}),
    "callbacks": lambda state: state.update(callbacks=[3]),
    "the state of a callback": lambda state: state["callbacks"][0].update(state={"dict": 3}),
    "history": lambda state: state.update(history=7),
    "another kind": lambda state: state.update(kind="run"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("trained")
    fitted_with(folder)()
    return folder  # type: ignore[return-value]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(trained: Path, tmp_path: Path, damage: str) -> None:
    record = json.loads((trained / "last.json").read_text())
    (tmp_path / record["tensors"]).write_bytes((trained / record["tensors"]).read_bytes())
    DAMAGES[damage](record["state"])
    (tmp_path / "last.json").write_text(json.dumps(record))
    made = learner()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"last\.json must be of this run"):
        made.fit(Sinusoid(2, 4), epochs=2, steps_per_epoch=2, callbacks=[Checkpoint(tmp_path)], resume=tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not hasattr(made, "learner_")


def halving(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.StepLR(optimizer, 1, 0.5)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": halving,
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 2, 5], 0.5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_schedules_go_on(name: str) -> None:
    def made() -> tuple[torch.optim.SGD, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates(optimizer: torch.optim.SGD, scheduler: Any, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    whole = rates(*made(), 9)
    assert len(set(whole)) > 1
    first, schedule = made()
    assert rates(first, schedule, 4) == whole[:4]
    stored = json.loads(json.dumps(pack_scheduler(schedule), allow_nan=False))
    again, fresh = made()
    again.load_state_dict(first.state_dict())
    unpack_scheduler(fresh, stored)
    assert rates(again, fresh, 5) == whole[4:]
    with pytest.raises(ValueError, match="was expected"):
        unpack_scheduler(fresh, {**stored, "more": 1})


def test_plain_values_come_back_as_they_were() -> None:
    value = {"a": (1, [2.5, None, True]), 3: {"x": "y"}, "far": [float("inf"), float("-inf")], (1, 2): ()}
    assert from_plain(json.loads(json.dumps(to_plain(value), allow_nan=False))) == value
    for bad in (torch.zeros(1), object(), {"f": print}, [F.mse_loss]):
        with pytest.raises(NotPlain):
            to_plain(bad)
    for broken in ({"tuple": 3}, {"dict": [3]}, {"dict": [[[1], 2]]}, {"float": "x"}, {"a": 1, "b": 2}, {"set": []}):
        with pytest.raises(ValueError, match="expected"):
            from_plain(broken)

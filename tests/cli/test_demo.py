from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastmeta.cli import demo as module
from fastmeta.cli import peers
from fastmeta.cli.demo import WRONG, Workload, check, demo
from fastmeta.learner.models import mlp
from fastmeta.tasks import Sinusoid
from tests import oracle


def waves(steps: int) -> Workload:
    return Workload("waves", mlp((1, 6, 1), torch.nn.Tanh), F.mse_loss, Sinusoid(3, 4).sample(), 0.05, steps)


@pytest.mark.parametrize("contestant", [peers.loop, peers.vmapped])
def test_the_peers_are_maml(contestant: object) -> None:
    load = waves(3)
    model, tasks = copy.deepcopy(load.model).double(), load.tasks.to(dtype=torch.float64)
    loss, grads = contestant(model, load.loss, tasks, load.lr, load.steps)  # type: ignore[operator]
    truth = oracle.maml_loop(model, load.loss, tasks.support, tasks.query, load.lr, load.steps)
    assert float(loss.detach()) == pytest.approx(float(truth[0]), rel=1e-12)
    assert peers.relative_error(grads, truth[3]) < 1e-12  # float64 rounding of a few hundred operations


def test_the_check_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(WRONG in row[1] for row in check(waves(2)))
    exact = peers.loop

    def first_order(model: object, loss: object, tasks: object, lr: float, steps: int) -> object:
        return exact(model, loss, tasks, lr, steps - 1)  # type: ignore[arg-type]

    monkeypatch.setattr(module.peers, "loop", first_order)
    assert all(WRONG in row[1] for row in check(waves(2)))


@pytest.mark.slow
def test_the_demonstration_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo(out=tmp_path / "demo", threads=None, iterations=2, waves=2, tasks=2, seconds=0.0)
    told = capsys.readouterr().out
    pictures = {"digits_learning_curve.png", "digits_adaptation.png", "sinusoid_adaptation.png"}
    assert {p.name for p in (tmp_path / "demo").iterdir()} == pictures
    for word in ("float64", "float32", "new digits", "inner", "ms"):
        assert word in told

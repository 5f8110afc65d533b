from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmeta import MAML
from fastmeta.learner.evaluation import Estimate, Evaluation, Stopped, evaluate
from fastmeta.learner.metric import accuracy, metric_of, mse
from fastmeta.learner.models import mlp
from fastmeta.tasks import Sinusoid


def test_an_estimate_is_a_mean_with_its_interval() -> None:
    found = Estimate.of(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert found.mean == 0.5
    assert found.ci95 == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)
    assert found.tasks == 4
    with pytest.raises(ValueError, match="tasks must be at least 2, got 1"):
        Estimate.of(torch.ones(1))


def test_figures_of_tasks() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 1.0]]])
    labels = torch.tensor([[0, 1], [0, 1]])
    assert accuracy(logits, labels).tolist() == [1.0, 0.5]
    assert accuracy(logits, labels, torch.tensor([[1.0, 1.0], [1.0, 0.0]])).tolist() == [1.0, 1.0]
    values = torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 3, 1)
    assert mse(torch.zeros(2, 3, 1), values).tolist() == [1, 4]
    assert mse(torch.zeros(2, 3), torch.ones(2, 3), torch.eye(2, 3)).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"metric: name must be one of .*'accuracy', 'mse'.*, got 'f1'"):
        metric_of("f1")


def test_evaluation_adapts_without_gradients() -> None:
    model = mlp((1, 8, 1), nn.Tanh)
    maml = MAML(model, F.mse_loss, lr=0.05, steps=1)
    before = torch.get_rng_state()
    found = evaluate(maml, Sinusoid(1, 10, 20, seed=1), "mse", tasks=7, steps=3, batch=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert found.after.tasks == found.before.tasks == 7
    assert found.steps == 3
    assert found.after.mean == pytest.approx(found.loss, rel=1e-5)  # the loss is the same mean, in float32
    assert found.after.mean < found.before.mean
    other = evaluate(maml, Sinusoid(1, 10, 20, seed=1), "mse", tasks=7, steps=0, batch=3)
    assert other.after.mean == found.before.mean == other.before.mean


def test_evaluation_stops_when_asked() -> None:
    maml = MAML(mlp((1, 4, 1)), F.mse_loss)
    with pytest.raises(Stopped):
        evaluate(maml, Sinusoid(1), "mse", tasks=4, steps=1, stop=lambda: True)


def test_better_is_larger_accuracy_or_smaller_error() -> None:
    estimate = Estimate(0.5, 0.1, 10)
    accuracy, error = (Evaluation(metric_of(m), estimate, estimate, 1.0, 1) for m in ("accuracy", "mse"))
    assert accuracy.better_than(0.4)
    assert not accuracy.better_than(0.6)
    assert error.better_than(0.6)
    assert not error.better_than(0.4)
    assert error.better_than(None)

"""Figures of tasks; ranking against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from fastmeta.algorithms.maml import MetaOutput
from fastmeta.learner.metric import Metric, metric_of, ndcg


@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_ndcg_is_the_usual_one(k: int) -> None:
    rng = np.random.default_rng(k)
    scores, relevance = rng.normal(size=(6, 8)), rng.integers(0, 5, (6, 8)).astype(float)
    relevance[0] = 0
    truth = [ndcg_score(relevance[t : t + 1], scores[t : t + 1], k=k) for t in range(6)]
    found = ndcg(torch.tensor(scores), torch.tensor(relevance), k=k)
    assert found.tolist() == pytest.approx(truth)
    assert found[0] == 0
    weights = torch.ones(6, 8).index_fill(1, torch.tensor([7]), 0)  # the last is padding
    cut = ndcg(torch.tensor(scores), torch.tensor(relevance), weights, k=k)
    alone = ndcg(torch.tensor(scores[:, :7]), torch.tensor(relevance[:, :7]), k=k)
    assert cut.tolist() == pytest.approx(alone.tolist())


def test_metrics_by_name() -> None:
    out = MetaOutput(torch.zeros(()), torch.tensor([2.0, 3.0]), torch.tensor([[[2.0], [1.0]]] * 2), torch.zeros(0))
    query = (torch.zeros(2, 2, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert metric_of("loss").score(out, query).tolist() == [2.0, 3.0]
    assert metric_of("ndcg@1").score(out, query).tolist() == [1.0, 0.0]
    assert metric_of("ndcg@5").score(out, query)[1] == pytest.approx(1 / np.log2(3))
    own = Metric("own", lambda out, query: out.task_losses, True)
    assert metric_of(own) is own
    assert own.better(2, 1)
    assert own.better(0, None)
    assert metric_of("loss").better(1, 2)
    for name in ("ndcg@0", "ndcg", "ndcg@x", "", 3):
        with pytest.raises(ValueError, match="metric: name must be one of"):
            metric_of(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"accuracy: query must be \(inputs, targets\).* got dict; judge by 'loss'"):
        metric_of("accuracy").score(out, {})
    with pytest.raises(ValueError, match=r"relevance must be at least 0, got -1\.0; shift or clip"):
        ndcg(torch.zeros(1, 2), torch.tensor([[0.0, -1.0]]), k=1)
    with pytest.raises(ValueError, match=r"relevance must be of shape \[1, 2\]"):
        ndcg(torch.zeros(1, 2), torch.zeros(1, 3), k=1)

"""What tasks are judged by: one figure a task, and whether more of it is better."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmeta.algorithms.maml import MetaOutput
from fastmeta.core import checks


@dataclass(frozen=True)
class Metric:
    """A figure by which a task is judged.

    Attributes:
        name: what it is called in records.
        score: ``score(out, query)``, the figure of each task, ``[T]``, of a meta-step's output and the query sets that
            it was computed on.
        larger: whether larger is better.
    """

    name: str
    score: Callable[[MetaOutput, Any], Tensor] = field(repr=False)
    larger: bool

    def better(self, value: float, than: float | None) -> bool:
        """Whether ``value`` beats ``than``; ``None`` is beaten by anything."""
        if than is None:
            return True
        return value > than if self.larger else value < than


def metric_of(metric: str | Metric) -> Metric:
    """A metric by name: ``loss``, ``accuracy``, ``mse``, or ``ndcg@k`` with a number for k; a :class:`Metric` as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(metric, Metric):
        return metric
    ranking = re.fullmatch(r"ndcg@([1-9]\d{0,8})", metric) if isinstance(metric, str) else None
    if ranking is not None:
        k = int(ranking[1])
        return Metric(metric, lambda out, query: ndcg(_ranked(out), *_judged("ndcg", query), k=k), True)
    if metric not in _NAMED:
        checks.fail(ValueError, "metric", "name", f"one of {[*_NAMED]}, 'ndcg@k' or a Metric", repr(metric))
    return _NAMED[metric]


def accuracy(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Share of the samples whose class has the highest score, ``[T]``.

    Args:
        outputs: scores of classes, ``[T, N, ways]``.
        targets: labels, ``[T, N]``.
        weights: one a sample, ``[T, N]``; 0 for padding.
    """
    return _mean((outputs.argmax(-1) == targets).to(torch.float64), weights)


def mse(outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error, ``[T]``, of ``outputs`` and ``targets``, ``[T, N, ...]``; ``weights`` as for accuracy."""
    errors = (outputs - targets).square()
    return _mean(errors.flatten(2).mean(2) if errors.dim() > 2 else errors, weights).to(torch.float64)


def ndcg(scores: Tensor, relevance: Tensor, weights: Tensor | None = None, *, k: int) -> Tensor:
    """Normalised discounted cumulative gain of the first k items, ``[T]``.

    ``DCG@k = sum_i rel_i / log2(i + 2)`` over the k items of highest score, in their order, divided by that of the best
    order. It is 0 for a task without a relevant item.

    Args:
        scores: what the model gives items, ``[T, N]``.
        relevance: how much each is worth, not negative, ``[T, N]``.
        weights: one an item, ``[T, N]``; items of weight 0 are padding and are ranked nowhere.
        k: length of the list.

    Raises:
        ValueError: shapes that differ, or a negative relevance.

    Source: K. Järvelin, J. Kekäläinen, ACM TOIS 2002.
    """
    checks.at_least("ndcg", "k", k, 1)
    checks.shape("ndcg", "relevance", relevance, scores.shape)
    if bool((relevance < 0).any()):
        checks.fail(ValueError, "ndcg", "relevance", "at least 0", float(relevance.min()), "shift or clip the ratings")
    gains = relevance.to(torch.float64)
    if weights is not None:
        scores = scores.masked_fill(weights == 0, -torch.inf)
        gains = gains * (weights != 0)
    count = min(k, scores.shape[1])
    discounts = torch.arange(2, count + 2, dtype=torch.float64, device=scores.device).log2().reciprocal()
    found = gains.gather(1, scores.topk(count).indices) @ discounts
    best = gains.topk(count).values @ discounts
    return torch.where(best > 0, found / best, 0.0)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean(1) if weights is None else (values * weights).sum(1) / weights.sum(1)


def _judged(name: str, query: Any) -> tuple[Tensor, ...]:
    """Targets, and weights where there are some."""
    if not isinstance(query, tuple) or len(query) not in (2, 3) or not isinstance(query[1], Tensor):
        checks.fail(
            ValueError, name, "query", "(inputs, targets) with one tensor of targets", type(query).__name__,
            "judge by 'loss', or by a Metric of your own",
        )  # fmt: skip
    return query[1:]


def _ranked(out: MetaOutput) -> Tensor:
    """Scores ``[T, N]`` of a model that gives one number an item, with or without an axis of its own."""
    return out.logits.squeeze(-1) if out.logits.dim() == 3 else out.logits


_NAMED = {
    "loss": Metric("loss", lambda out, query: out.task_losses.detach().to(torch.float64), False),
    "accuracy": Metric("accuracy", lambda out, query: accuracy(out.logits, *_judged("accuracy", query)), True),
    "mse": Metric("mse", lambda out, query: mse(out.logits, *_judged("mse", query)), False),
}

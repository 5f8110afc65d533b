"""The best of many items by their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmeta.core import checks


class Recommendation(NamedTuple):
    """The best items of a user, best first.

    Attributes:
        items: their numbers, ``[k]``, or ``[T, k]`` for T users.
        scores: what the adapted model gives them, likewise.
    """

    items: Tensor
    scores: Tensor


def best_items(scores: Any, k: int, exclude: Sequence[Any] | Tensor | None) -> Recommendation:
    """The ``k`` items of highest score of every user.

    Args:
        scores: of N items for T users, ``[T, N]`` or ``[T, N, 1]``.
        k: how many.
        exclude: T sequences of numbers of items that are left out.

    Raises:
        ValueError: other shapes, a score that is not finite, an item that does not exist, or fewer than ``k`` are left.
    """
    if isinstance(scores, Tensor) and scores.dim() == 3 and scores.shape[2] == 1:
        scores = scores.squeeze(2)
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        got = list(scores.shape[1:]) if isinstance(scores, Tensor) else type(scores).__name__
        checks.fail(ValueError, "recommend", "the model's outputs", "one score an item, [N] or [N, 1]", got)
    checks.finite("recommend", "scores", scores)
    left = torch.ones_like(scores, dtype=torch.bool)
    if exclude is not None:
        if len(exclude) != len(scores):
            checks.fail(ValueError, "recommend", "exclude", f"{len(scores)} sequences, one a user", len(exclude))
        for row, numbers in enumerate(exclude):
            left[row, _numbers(numbers, scores.shape[1]).to(scores.device)] = False
    fewest = int(left.sum(1).min())
    if k > fewest:
        checks.fail(ValueError, "recommend", "k", f"at most the {fewest} items that are left", k)
    best = scores.masked_fill(~left, -torch.inf).topk(k)
    return Recommendation(best.indices, best.values)


def _numbers(numbers: Any, items: int) -> Tensor:
    found = torch.as_tensor(numbers)
    if found.numel() == 0:
        return found.to(torch.int64)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        checks.fail(ValueError, "recommend", "exclude", "numbers of items, a sequence for each user", repr(numbers))
    if int(found.min()) < 0 or int(found.max()) >= items:
        checks.fail(ValueError, "recommend", "exclude", f"numbers below {items}, and not negative", found.tolist())
    return found.to(torch.int64)

"""The rows of a table that each task touches: their numbers, and their sum over tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def numbered(
    indices: Tensor,  # int64 [T, n]
    size: int,
    apart: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:  # int64 [T, n], [T, R]
    """Each task's distinct indices, numbered from 0 in rising order.

    There are always ``R = min(size, n) + len(apart)`` numbers, so that no shape depends on values; those a task does
    not need stand for row 0, and nothing reads them.

    Args:
        indices: of the rows that a task touches, as often as it does.
        size: rows of the table.
        apart: indices whose numbers are the last ones, in this order, in every task.

    Returns:
        The numbers of ``indices``, and the row that each number stands for.

    Raises:
        IndexError: an index is not in the table. On a GPU the device asserts, as it does for PyTorch's own lookup.
    """
    if not indices.is_cuda and indices.numel():  # there the question would make the processor wait for the device
        least, most = (int(bound) for bound in indices.aminmax())
        if least < 0 or most >= size:
            raise IndexError(
                f"embedding: indices must be in [0, {size}), got {least if least < 0 else most}; check the tokenizer "
                "or the table's size"
            )
    tasks, count = indices.shape
    own = min(size, count)
    ordered, order = indices.sort(1)
    rank = torch.zeros_like(ordered)
    rank[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    touched = indices.new_zeros(tasks, own + len(apart)).scatter_(1, rank, ordered)
    numbers = torch.empty_like(indices).scatter_(1, order, rank)
    for number, row in enumerate(apart, own):
        touched[:, number] = row
        numbers.masked_fill_(indices == row, number)
    return numbers, touched


def add_rows(
    total: Tensor,  # [V, D]
    touched: Tensor,  # int64 [T, R]
    rows: Tensor,  # [T, R, D]
) -> Tensor:  # [V, D]
    """``total``, with each task's rows added where they belong, task after task: always in the same order."""
    where, values = touched.flatten(), rows.flatten(0, 1)
    if total.is_cuda:  # where index_add_ takes them in any order
        return total.index_put_((where,), values, accumulate=True)
    return total.index_add_(0, where, values)

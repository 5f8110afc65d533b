"""Which rows of padded sequences anything reads, from the tasks' data alone, eq. (31)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighted:
    """A reader that multiplies rows by data, or fills them by a mask: those times zero are not read, nor those filled.

    Attributes:
        index: of the data among a task's.
        shape: of the data as the reader sees them, without the task axis; it broadcasts to that of the values.
        values: shape of the values as the reader sees them; the last axis is a row's.
        zeros: whether rows are read where the data are zero, instead of where they are not.
    """

    index: int
    shape: tuple[int, ...]
    values: tuple[int, ...]
    zeros: bool = False

    def rows(self, data: Sequence[Tensor]) -> Tensor:
        """Whether each row is read, ``[T, rows]``."""
        tasks = data[self.index].shape[0]
        aligned = (1,) * (len(self.values) - len(self.shape)) + self.shape
        read = ((data[self.index].reshape(tasks, *aligned) != 0) != self.zeros).any(-1)
        return read.expand(tasks, *self.values[:-1]).reshape(tasks, -1)


@dataclass(frozen=True)
class Picked:
    """A reader that takes the same rows of every task.

    Attributes:
        flags: whether each row is among them.
    """

    flags: tuple[bool, ...]

    def rows(self, data: Sequence[Tensor]) -> Tensor:
        """Whether each row is read, ``[T, rows]``."""
        return torch.tensor(self.flags).expand(data[0].shape[0], -1)


@dataclass(frozen=True)
class Attended:
    """The mask that an attention adds to its scores, with keys and queries of the same rows.

    Attributes:
        index: of the mask among a task's data; ``None`` where there is none.
        shape: of the mask as the attention sees it, without the task axis.
        causal: whether no key has weight for an earlier query.
    """

    index: int | None
    shape: tuple[int, ...] = ()
    causal: bool = False

    def reached(self, data: Sequence[Tensor], sequences: int, length: int) -> Tensor:
        """Whether the softmax gives a key any weight: ``[T, sequences, queries, keys]``.

        A score that the smallest number of its dtype was added to has none, unless a query's scores all have.
        """
        tasks = data[0].shape[0]
        ways = torch.ones(1, 1, 1, length, length, dtype=torch.bool)  # tasks, sequences, heads, queries, keys
        if self.causal:
            ways = ways.tril()
        if self.index is not None:
            mask = data[self.index]
            open_ = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            ways = ways & open_.reshape(tasks, *(1,) * (4 - len(self.shape)), *self.shape)
        ways = ways | ~ways.any(-1, keepdim=True)
        return ways.any(2).expand(tasks, sequences, length, length)


@dataclass(frozen=True)
class KeptRows:
    """The rows of ``sequences`` times ``length`` that are read.

    Attributes:
        readers: what reads rows from outside.
        attentions: what mixes them, in the order of execution.
    """

    sequences: int
    length: int
    readers: tuple[Weighted | Picked, ...]
    attentions: tuple[Attended, ...]

    def share(self, lists: Tensor) -> float:
        """The part of all rows that the lists of some tasks keep."""
        return float(lists[:, self.sequences].double().mean()) / (self.sequences * self.length)

    @property
    def numbers(self) -> int:
        """Of a task's list."""
        return self.sequences + 1 + self.sequences * self.length

    def list_of(self, data: Sequence[Tensor]) -> Tensor:
        """Each task's list, ``[T, numbers]`` of int64, as csrc/common/kept_rows.h has it.

        With r the rows that are read from outside and A(q, k) whether any attention gives key k weight for query q,
        those that are kept are the least set that holds r, with q also every k with A(q, k), and of each sequence one.
        """
        tasks, whole = data[0].shape[0], (data[0].shape[0], self.sequences, self.length)
        kept = torch.stack([reader.rows(data) for reader in self.readers]).any(0).reshape(whole)
        kept[..., 0] |= ~kept.any(-1)
        ways = [one.reached(data, self.sequences, self.length) for one in dict.fromkeys(self.attentions)]
        way = torch.stack(ways).any(0) if ways else None
        before = -1
        while way is not None and before != (before := int(kept.sum())):
            kept = kept | (kept.unsqueeze(-1) & way).any(-2)
        starts = torch.zeros(tasks, self.sequences + 1, dtype=torch.int64)
        torch.cumsum(kept.sum(-1), 1, out=starts[:, 1:])
        positions = torch.argsort((~kept).reshape(tasks, -1).to(torch.uint8), dim=1, stable=True)
        return torch.cat([starts, positions], 1)

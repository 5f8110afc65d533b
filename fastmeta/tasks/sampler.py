"""What every source of tasks has in common: an endless, seeded stream of task batches that can be saved and resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmeta.core import checks
from fastmeta.tasks.batch import TaskBatch

Indices = NDArray[np.int64]


class TaskSampler(ABC):
    """An endless stream of task batches from one seed.

    Two samplers of the same arguments and seed give the same tasks. ``state_dict`` holds what a resumed run needs to go
    on with the very next batch; it is plain JSON.

    Args:
        tasks: tasks of a batch, T.
        seed: seed of the stream, at least 0.
    """

    def __init__(self, tasks: int, seed: int) -> None:
        self.tasks = count(type(self).__name__, "tasks", tasks)
        self._rng = np.random.Generator(np.random.PCG64(count(type(self).__name__, "seed", seed, least=0)))

    @abstractmethod
    def sample(self, tasks: int | None = None) -> TaskBatch:
        """The next batch, of ``tasks`` tasks where that is given."""

    def __iter__(self) -> Iterator[TaskBatch]:
        while True:
            yield self.sample()

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, as JSON takes it."""
        return {"generator": dict(self._rng.bit_generator.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: ``state`` is not one that :meth:`state_dict` gave.
        """
        try:
            self._rng.bit_generator.state = state["generator"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{type(self).__name__}: state must come from state_dict(), got {error!r}") from error

    def _batch_size(self, tasks: int | None) -> int:
        return self.tasks if tasks is None else count(type(self).__name__, "tasks", tasks)


def count(op: str, name: str, value: int, least: int = 1) -> int:
    """Return ``value``, a whole number of something, as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        checks.fail(TypeError, op, name, "an integer", repr(value))
    checks.at_least(op, name, value, least)
    return int(value)


def draw_distinct(rng: np.random.Generator, rows: int, sizes: int | Indices, picks: int) -> Indices:
    """Draw ``picks`` distinct numbers from ``range(sizes[r])`` for every row r, in random order.

    R. Floyd's algorithm (J. Bentley, "A sample of brilliance", CACM 1987), run on all rows at once: its work does not
    depend on ``sizes``, so thousands of classes cost no more than ten.

    Args:
        rng: where the randomness comes from.
        rows: number of rows.
        sizes: one size for all rows, or one a row, ``[rows]``; each at least ``picks``.
        picks: how many to draw.

    Returns:
        ``[rows, picks]``.
    """
    drawn = np.empty((rows, picks), np.int64)
    uniform = rng.random((picks, rows))
    for i in range(picks):
        last = sizes - picks + i
        pick = (uniform[i] * (last + 1)).astype(np.int64)
        repeated = (drawn[:, :i] == pick[:, None]).any(axis=1)
        drawn[:, i] = np.where(repeated, last, pick)
    order = rng.random((rows, picks)).argsort(axis=1)  # Floyd's sets are uniform, their order is not
    return np.take_along_axis(drawn, order, axis=1)

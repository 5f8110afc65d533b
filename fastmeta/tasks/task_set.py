"""Tasks that are all there, one by one, as a stream of shuffled batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from fastmeta.core import checks
from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.sampler import TaskSampler


class Tasks(Protocol):
    """Tasks by number, as a list or a map-style dataset has them."""

    def __len__(self) -> int:
        """Number of tasks."""

    def __getitem__(self, index: int, /) -> Any:
        """``(support, query)`` of a task, each ``(inputs, targets)``."""


class TaskSet(TaskSampler):
    """Batches of the tasks of a set: every task once, in random order, then again in another.

    Users with their ratings, patients with their measurements, or any other tasks that are not drawn from classes.
    Tasks of unequal size are padded, and weighted, by :meth:`fastmeta.TaskBatch.stack`.

    Args:
        items: ``(support, query)`` by number, each ``(inputs, targets)``, without task axis.
        tasks: tasks of a batch, T.
        seed: seed of the order.

    Raises:
        ValueError: there are no tasks.
    """

    def __init__(self, items: Tasks, tasks: int = 16, *, seed: int = 0) -> None:
        super().__init__(tasks, seed)
        checks.at_least("TaskSet", "len(items)", len(items), 1)
        self.items = items
        self._order: list[int] = []  # what is left of this pass

    def __len__(self) -> int:
        return len(self.items)

    def sample(self, tasks: int | None = None) -> TaskBatch:
        """The next batch, which may end one pass and begin the next."""
        size = self._batch_size(tasks)
        chosen: list[int] = []
        while len(chosen) < size:
            if not self._order:
                self._order = self._rng.permutation(len(self.items)).tolist()
            taken = size - len(chosen)
            chosen += self._order[:taken]
            del self._order[:taken]
        return self._stack(chosen)

    def in_order(self, batch: int | None = None) -> Iterator[TaskBatch]:
        """Every task once, in the set's order; the last batch may be smaller. The stream stays where it is."""
        size = self._batch_size(batch)
        for start in range(0, len(self.items), size):
            yield self._stack(list(range(start, min(start + size, len(self.items)))))

    def state_dict(self) -> dict[str, Any]:
        """State of the generator and what is left of the pass."""
        return super().state_dict() | {"order": list(self._order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: ``state`` is not one that :meth:`state_dict` gave for a set of this size.
        """
        order = state.get("order") if isinstance(state, Mapping) else None
        if not isinstance(order, list) or not all(type(i) is int and 0 <= i < len(self.items) for i in order):
            raise ValueError(f"TaskSet: state must come from state_dict() of a set of {len(self.items)} tasks")
        super().load_state_dict(state)
        self._order = list(order)

    def _stack(self, chosen: list[int]) -> TaskBatch:
        picked = []
        for index in chosen:
            item = self.items[index]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                checks.fail(TypeError, "TaskSet", f"items[{index}]", "(support, query)", type(item).__name__)
            picked.append((item[0], item[1]))
        return TaskBatch.stack(picked)

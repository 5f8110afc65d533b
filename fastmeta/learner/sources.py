"""What :meth:`MetaLearner.fit` and ``evaluate`` take tasks from, in whatever form they come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from fastmeta.core import checks
from fastmeta.learner.evaluation import drawn
from fastmeta.learner.loop import Source
from fastmeta.tasks.batch import TaskBatch
from fastmeta.tasks.sampler import TaskSampler
from fastmeta.tasks.task_set import TaskSet

FORMS = "a TaskSampler, a TaskBatch, tasks (support, query) by number, or batches with a length"
STEPS = 100  # meta-steps of an epoch where the tasks have no end


class Batches:
    """The batches of an iterable with a length, such as a list or a ``DataLoader``, pass after pass.

    Going on within a pass begins it again from the random state it began with and passes over what was taken. The
    random state is PyTorch's, and that of the iterable's ``generator`` if it has one, as a ``DataLoader`` may.

    Args:
        batches: gives :class:`fastmeta.TaskBatch`.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, batches: Any) -> None:
        checks.at_least("fit", "len(tasks)", len(batches), 1)
        self.batches = batches
        self._iterator: Iterator[Any] | None = None
        self._taken = 0
        self._began: list[str] = []  # generators' states at the beginning of the pass

    def sample(self) -> TaskBatch:
        """The next batch."""
        if self._iterator is None or self._taken == len(self.batches):
            self._began = [_text(state) for state in self._states()]
            self._iterator, self._taken = iter(self.batches), 0
        batch = next(self._iterator, None)
        if not isinstance(batch, TaskBatch):
            got = f"{type(batch).__name__} as number {self._taken}"
            mend = "a DataLoader makes them by collate_fn=TaskBatch.stack"
            checks.fail(TypeError, "fit", "tasks", f"{len(self.batches)} batches that are TaskBatch", got, mend)
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches of the pass are taken, and what it began with."""
        began = self._began if self._taken else [_text(state) for state in self._states()]
        return {"taken": self._taken, "began": began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: ``state`` is not one that :meth:`state_dict` gave for as many batches.
        """
        taken, began = state["taken"], state["began"]
        if type(taken) is not int or not 0 <= taken <= len(self.batches):
            checks.fail(ValueError, "fit", "state", f"one of {len(self.batches)} batches a pass", f"{taken} taken")
        self._iterator, self._taken = None, 0
        now = torch.get_rng_state()
        for put, value in zip(self._puts(), began, strict=True):
            put(torch.frombuffer(bytearray.fromhex(value), dtype=torch.uint8))
        for _ in range(taken):
            self.sample()
        torch.set_rng_state(now)

    def _states(self) -> list[torch.Tensor]:
        own = getattr(self.batches, "generator", None)
        return [torch.get_rng_state(), *([own.get_state()] if isinstance(own, torch.Generator) else [])]

    def _puts(self) -> list[Any]:
        own = getattr(self.batches, "generator", None)
        return [torch.set_rng_state, *([own.set_state] if isinstance(own, torch.Generator) else [])]


class Training(NamedTuple):
    """Tasks to train on.

    Attributes:
        source: gives the batches.
        steps: meta-steps of an epoch.
    """

    source: Source
    steps: int


def training_source(
    tasks: Any, *, tasks_per_step: int, steps_per_epoch: int | None, seed: int, accumulate: int = 1
) -> Training:
    """Tasks in any form, as the loop takes them, ``accumulate`` batches at a meta-step.

    An epoch is ``steps_per_epoch`` meta-steps, or else one pass over tasks that have an end, or 100 meta-steps. A
    meta-step that a pass has too few batches left for goes on in the next pass.

    Raises:
        TypeError: none of the forms.
        ValueError: no tasks.
    """
    source: Source
    if isinstance(tasks, TaskBatch):
        tasks = [tasks]
    if _one_by_one(tasks):
        tasks = TaskSet(tasks, tasks_per_step, seed=seed)
    if isinstance(tasks, TaskSet):
        source, steps = tasks, math.ceil(len(tasks) / (tasks.tasks * accumulate))
    elif isinstance(tasks, TaskSampler):
        source, steps = tasks, STEPS
    elif isinstance(tasks, Iterable) and isinstance(tasks, Sized):
        source, steps = Batches(tasks), math.ceil(len(tasks) / accumulate)
    else:
        checks.fail(TypeError, "fit", "tasks", FORMS, type(tasks).__name__)
    return Training(source, steps if steps_per_epoch is None else steps_per_epoch)


def judged_batches(tasks: Any, *, number: int, batch: int) -> Iterable[TaskBatch]:
    """Tasks in any form, to be judged once each, ``batch`` at a time; of a sampler the next ``number``.

    Raises:
        TypeError: none of the forms.
    """
    if isinstance(tasks, TaskBatch):
        return (tasks[start : start + batch] for start in range(0, len(tasks), batch))
    if isinstance(tasks, TaskSampler):
        return drawn(tasks, number, batch)
    if _one_by_one(tasks):
        return TaskSet(tasks, batch).in_order()
    if not isinstance(tasks, Iterable):
        checks.fail(TypeError, "evaluate", "tasks", FORMS, type(tasks).__name__)
    return _checked(tasks)


def _one_by_one(tasks: Any) -> bool:
    """Whether these are tasks by number, and not batches."""
    if not isinstance(tasks, (Sequence, Dataset)) or not hasattr(tasks, "__len__"):
        return False
    return len(tasks) > 0 and not isinstance(tasks[0], TaskBatch)


def _checked(batches: Iterable[Any]) -> Iterator[TaskBatch]:
    for batch in batches:
        if not isinstance(batch, TaskBatch):
            checks.fail(TypeError, "evaluate", "tasks", "batches that are TaskBatch", type(batch).__name__)
        yield batch


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()

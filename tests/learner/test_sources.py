"""Tasks in every form, and streams of them that go on where they stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastmeta import TaskBatch
from fastmeta.learner.sources import Batches, judged_batches, training_source
from fastmeta.tasks import Sinusoid, TaskSet


def tasks(count: int) -> list[Any]:
    return [
        ((torch.full((2, 1), float(i)), torch.zeros(2, 1)), (torch.zeros(1, 1), torch.zeros(1, 1)))
        for i in range(count)
    ]


def numbers(batch: TaskBatch) -> list[int]:
    """Which tasks these are."""
    inputs: Tensor = batch.support[0]
    return [int(i) for i in inputs[:, 0, 0]]


def loader(**options: Any) -> DataLoader:
    return DataLoader(tasks(7), batch_size=3, shuffle=True, collate_fn=TaskBatch.stack, **options)


STREAMS: dict[str, Callable[[], Any]] = {
    "list": lambda: Batches([TaskBatch.stack(tasks(3)[i:]) for i in range(3)]),
    "loader": lambda: Batches(loader()),
    "generator": lambda: Batches(loader(generator=torch.Generator().manual_seed(3))),
    "set": lambda: TaskSet(tasks(7), 3, seed=1),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_a_stream_goes_on_with_the_very_next_batch(name: str, taken: int) -> None:
    def run(stream: Any, count: int) -> list[list[int]]:
        return [numbers(stream.sample()) for _ in range(count)]

    torch.manual_seed(5)
    whole = run(STREAMS[name](), 8)
    torch.manual_seed(5)
    first = STREAMS[name]()
    assert run(first, taken) == whole[:taken]
    stored, generator = json.loads(json.dumps(first.state_dict())), torch.get_rng_state()
    torch.manual_seed(99)
    again = STREAMS[name]()
    again.sample()
    again.load_state_dict(stored)
    torch.set_rng_state(generator)
    assert run(again, 8 - taken) == whole[taken:]


def test_a_set_is_gone_through_in_passes() -> None:
    stream = TaskSet(tasks(7), 3, seed=1)
    drawn = [i for _ in range(7) for i in numbers(stream.sample())]
    assert all(sorted(drawn[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert drawn[:7] != drawn[7:14]
    assert [numbers(b) for b in stream.in_order(4)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert numbers(TaskSet(tasks(7), 3, seed=1).sample(5)) == drawn[:5]
    assert [i for _ in range(7) for i in numbers(TaskSet(tasks(7), 3, seed=2).sample())] != drawn
    for state in ({}, {"order": [7]}, {"order": [True]}, {"order": ["1"]}, {"order": [0]}, [0]):
        with pytest.raises(ValueError, match="TaskSet: state must come from state_dict"):
            stream.load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"len\(items\) must be at least 1"):
        TaskSet([])
    with pytest.raises(TypeError, match=r"items\[0\] must be \(support, query\), got Tensor"):
        TaskSet([torch.zeros(3)]).sample()


def test_forms_of_tasks_to_train_on() -> None:
    def steps(given: Any, asked: int | None = None) -> int:
        return training_source(given, tasks_per_step=2, steps_per_epoch=asked, seed=0).steps

    batch = TaskBatch.stack(tasks(4))
    assert [steps(given) for given in (Sinusoid(2), batch, [batch, batch], loader(), tasks(7))] == [100, 1, 2, 3, 4]
    assert steps(TaskSet(tasks(7), 4)) == 2
    assert steps(batch, 5) == 5
    for empty in ([], ()):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            steps(empty)
    for wrong in (3, iter([batch]), None):
        with pytest.raises(TypeError, match="tasks must be a TaskSampler"):
            steps(wrong)


def test_forms_of_tasks_to_be_judged() -> None:
    def sizes(given: Any) -> list[int]:
        return [len(b) for b in judged_batches(given, number=5, batch=2)]

    batch = TaskBatch.stack(tasks(3))
    assert sizes(Sinusoid(2)) == [2, 2, 1]
    assert sizes(batch) == [2, 1]
    assert sizes(tasks(3)) == [2, 1]
    assert sizes([batch, batch]) == sizes(iter([batch, batch])) == [3, 3]
    assert sizes(loader()) == [3, 3, 1]
    with pytest.raises(TypeError, match="batches that are TaskBatch, got int"):
        sizes(iter([3]))
    with pytest.raises(TypeError, match=r"tasks must be a TaskSampler, .* got int"):
        sizes(3)


def test_a_damaged_state_is_refused() -> None:
    stream = Batches(loader())
    stream.sample()
    good = stream.state_dict()
    for change in ({"taken": 9}, {"taken": "1"}, {"began": []}, {"began": ["zz"]}):
        with pytest.raises(ValueError, match=r"."):
            stream.load_state_dict(good | change)

"""The native executor's profile: every map is there as often as it runs, and the times fit into the whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.engine.cost import MAPS
from fastmeta.engine.profile import Profile, Record, collect, collecting

pytestmark = pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")
TASKS, STEPS, RUNS = 6, 3, 2


def conv_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)),
    )


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))


def batch(*shape: int, sizes: tuple[int, int] = (4, 5)) -> fm.TaskBatch:
    made = [(torch.randn(TASKS, n, *shape), torch.randint(3, (TASKS, n))) for n in sizes]
    return fm.TaskBatch(*made)


def profiled(maml: fm.MAML, tasks: fm.TaskBatch, runs: int = RUNS) -> tuple[Profile, float]:
    begin = time.perf_counter()
    with collect() as profile:
        for _ in range(runs):
            maml.value_and_grad(tasks)
    return profile, time.perf_counter() - begin


def calls(records: list[Record]) -> dict[tuple[str, str, str, str], int]:
    found = Counter()
    for r in records:
        found[r.operation, r.module, r.phase, r.map] += r.calls
    return dict(found)


@pytest.mark.parametrize("threads", [1, 2, 5, TASKS + 2])
def test_every_operation_is_there_as_often_as_it_runs(threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    maml = fm.MAML(conv_net(), F.cross_entropy, lr=0.1, steps=STEPS, executor="native")
    profile, wall = profiled(maml, batch(1, 8, 8))
    operations = [("conv_block", "0"), ("conv_block", "4"), ("flatten", ""), ("linear_block", "7"), ("loss", "")]
    wanted = {(*o, "support", m): RUNS * TASKS * STEPS for o in operations for m in MAPS}
    wanted |= {(*o, "query", m): RUNS * TASKS for o in operations for m in MAPS[:2]}
    assert calls(profile.records) == wanted
    assert profile.meta_steps == RUNS
    assert 0 < profile.seconds <= wall
    # No thread is counted twice at a time, whether it has a task of its own or shares one with others.
    assert 0 < sum(r.seconds for r in profile.records) <= threads * profile.seconds
    assert all(r.seconds >= 0 for r in profile.records)


def test_a_gradient_of_first_order_has_no_tangents() -> None:
    maml = fm.MAML(linear_net(), F.cross_entropy, steps=STEPS, first_order=True, executor="native")
    found = calls(profiled(maml, batch(4))[0].records)
    assert {key[3] for key in found} == {"forward", "backward"}
    assert found["linear_block", "2", "support", "backward"] == RUNS * TASKS * STEPS


def test_operations_are_those_of_explain_and_bytes_those_of_the_operands() -> None:
    maml, tasks = fm.MAML(linear_net(), F.cross_entropy, steps=STEPS, executor="native"), batch(4)
    records = profiled(maml, tasks)[0].records
    assert sum(r.flops for r in records) == RUNS * maml.explain(tasks).flops
    by_map = {(r.module, r.map): r.bytes // r.calls for r in records if r.phase == "support"}
    x, w, y = 4 * 4, 4 * 9 + 9, 4 * 9  # elements of the first layer: rows of data, parameters, result
    assert [by_map["0", m] // 4 for m in MAPS] == [x + w + y, x + w + y + w, x + w + w + y, x + w + y + w + y + w]
    x, w, y = 4 * 9, 9 * 3 + 3, 4 * 3
    assert by_map["2", "backward"] == 4 * (x + w + y + x + w)
    assert by_map["2", "tangent"] == 4 * (x + w + x + w + y)
    assert by_map["2", "tangent_backward"] == 4 * (x + w + y + x + w + y + x + w)
    loss = 4 * (4 * 3) + 8 * 4  # rows of three numbers, labels of 64 bits
    assert by_map["", "forward"] == loss + 4


def test_parameters_that_do_not_adapt_have_a_cotangent_and_no_tangent() -> None:
    maml = fm.MAML(linear_net(), F.cross_entropy, parameters=["2.*"], executor="native")
    found = {(r.operation, r.module, r.phase, r.map): r.bytes // r.calls for r in profiled(maml, batch(4))[0].records}
    for absent in ("tangent", "tangent_backward"):
        assert ("linear_block", "0", "support", absent) not in found
    x, w, y = 4 * 4, 4 * 9 + 9, 4 * 9
    assert found["linear_block", "0", "support", "backward"] == 4 * (x + w + y + w)


def test_nothing_is_collected_outside_and_the_innermost_block_collects() -> None:
    maml, tasks = fm.MAML(linear_net(), F.cross_entropy, executor="native"), batch(4)
    assert collecting() is None
    with collect() as outer:
        maml.value_and_grad(tasks)
        with collect() as inner:
            maml.value_and_grad(tasks)
            maml.value_and_grad(batch(4, sizes=(2, 3)))  # another program
        maml(tasks).loss.backward()
    maml.value_and_grad(tasks)
    assert (outer.meta_steps, inner.meta_steps) == (2, 2)
    assert len(inner.records) == 2 * len(outer.records)
    assert Profile().records == []


def test_a_profiled_gradient_has_the_same_bits() -> None:
    maml, tasks = fm.MAML(conv_net(), F.cross_entropy, steps=STEPS, executor="native"), batch(1, 8, 8)
    plain: dict[str, Tensor] = maml.value_and_grad(tasks)[1]
    with collect():
        timed = maml.value_and_grad(tasks)[1]
    assert all(torch.equal(plain[name], timed[name]) for name in plain)

"""A memory budget: the same gradients within it, tasks and activations by what was counted, predictions that hold."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import rates
from fastmeta.core.live_bytes import Exceeded, LiveBytes
from fastmeta.engine import meta_step
from fastmeta.engine.budget import Peak
from fastmeta.engine.segments import starts
from tests.oracle import relative_error
from tests.process_memory import in_a_process, needs_a_mark

pytestmark = pytest.mark.usefixtures("traced_once")
T = 6
TINY = 1  # byte: nothing fits


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def conv() -> nn.Sequential:
    block = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(4 * 9, 3))


def tasks_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, support: int = 5) -> fm.TaskBatch:
    torch.manual_seed(1)
    sets = [(torch.randn(T, n, *shape, dtype=dtype), torch.randint(3, (T, n))) for n in (support, 6)]
    return fm.TaskBatch(*sets)


def wide(support: int = 400) -> tuple[nn.Sequential, fm.TaskBatch]:
    """Activations, not weights, are what is kept."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)), tasks_of(
        (8,), torch.float32, support=support
    )


CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "mlp": (mlp, (4,), {}),
    "conv": (conv, (1, 6, 6), {}),
    "factors": (mlp, (4,), {"plan": "factored"}),
    "head": (mlp, (4,), {"parameters": ["3.*"]}),
    "running statistics": (mlp, (4,), {"update_running_stats": True}),
    "first order": (mlp, (4,), {"first_order": True}),
}


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
@pytest.mark.parametrize("case", CASES)
def test_activations_computed_again_give_the_exact_meta_gradient(case: str) -> None:
    build, shape, options = CASES[case]
    torch.manual_seed(0)
    model, tasks = build().double(), tasks_of(shape)
    rate = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64, requires_grad=True)
    maml = fm.MAML(model, F.cross_entropy, rate, 3, executor="reference", memory_budget=TINY, **options)
    assert maml.explain(tasks).recomputes
    loss, gradients = maml.value_and_grad(tasks)
    free = fm.MAML(model, F.cross_entropy, rate, 3, executor="reference", **options)
    truth_loss, truth = free.value_and_grad(tasks)
    assert relative_error(loss, truth_loss) <= 1e-12
    assert relative_error(gradients, truth) <= 1e-12  # the same operations, tasks summed in another order
    out = maml(tasks)
    out.task_losses[1].backward()  # another objective: the meta-step runs again
    assert all(p.grad is not None for p in model.parameters())


def test_a_query_pass_is_computed_again_in_segments() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(30)]
    model, tasks = nn.Sequential(*layers, nn.Linear(16, 3)).double(), tasks_of((16,), support=2)
    options = {"executor": "reference", "chunk_size": 1}
    large = fm.TaskBatch(tasks.support, tuple(leaf.repeat_interleave(200, 1) for leaf in tasks.query))
    peaks = []
    for budget in (None, TINY):
        maml = fm.MAML(model, F.cross_entropy, 0.1, 2, memory_budget=budget, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            maml.value_and_grad(large)
            with LiveBytes() as live:
                loss, gradients = maml.value_and_grad(large)
        peaks.append(live.peak)
        if budget is None:
            truth_loss, truth = loss, gradients
    assert relative_error(loss, truth_loss) <= 1e-12
    assert relative_error(gradients, truth) <= 1e-12
    # 60 activations of 1200 rows and their cotangents, or those of about sqrt(60) and as many values at their starts
    assert peaks[1] < peaks[0] / 2


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=60))
def test_segments_hold_no_more_than_the_whole(sizes: list[tuple[int, int]]) -> None:
    made, live = [m for m, _ in sizes], [0, *(n for _, n in sizes[1:])]
    found = starts(made, live)
    assert found[0] == 0
    assert list(found) == sorted(set(found))
    assert found[-1] < len(made)
    sums = [sum(made[a:b]) for a, b in pairwise((*found, len(made)))]
    assert 2 * max(sums) + sum(live[start] for start in found) <= 2 * sum(made)


def test_a_chain_is_cut_into_about_the_root_of_its_length() -> None:
    assert 10 <= len(starts([1] * 100, [0] + [1] * 99)) <= 20  # of s segments s values and 2 * 100 / s are held


def test_segments_end_where_little_is_live() -> None:
    live = [0] + [9] * 99
    narrow = range(10, 100, 10)
    for position in narrow:
        live[position] = 1
    assert set(starts([3] * 100, live)) <= {0, *narrow}


def test_as_many_tasks_run_as_fit() -> None:
    model, tasks = wide()
    every = fm.MAML(model, F.cross_entropy, 0.1, 4, executor="reference", chunk_size=T)
    whole = every.explain(tasks)
    assert whole.tasks_at_once == T
    assert not whole.recomputes
    found = []
    for share in (1.01, 0.8, 0.6, 0.4, 0.2, 0.1):
        budget = int(share * whole.peak)
        cut = fm.MAML(model, F.cross_entropy, 0.1, 4, executor="reference", chunk_size=T, memory_budget=budget)
        told = cut.explain(tasks)
        assert told.peak <= budget
        found.append((told.tasks_at_once, told.recomputes))
    assert found[0] == (T, False)
    assert [tasks for tasks, again in found if not again] == sorted(
        (t for t, again in found if not again), reverse=True
    )
    assert found[-1][1]  # where not one task's activations fit, they are computed again
    assert len({tasks for tasks, again in found if not again}) >= 4


@pytest.mark.parametrize("share", [1.5, 0.5, 0.25, 0.1])
def test_the_prediction_is_what_a_meta_step_holds(share: float) -> None:
    model, tasks = wide()
    options = {"executor": "reference", "chunk_size": T}
    whole = fm.MAML(model, F.cross_entropy, 0.1, 4, **options).explain(tasks).peak
    maml = fm.MAML(model, F.cross_entropy, 0.1, 4, memory_budget=int(share * whole), **options)
    told = maml.explain(tasks)
    with LiveBytes() as live:
        maml.value_and_grad(tasks)
    assert abs(told.peak / live.peak - 1) <= 0.01  # but for some numbers a run keeps
    assert live.peak <= maml.memory_budget


def test_factors_of_further_tasks_are_added_where_the_sum_is() -> None:
    torch.manual_seed(0)
    model, tasks = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 3)), tasks_of((512,), torch.float32, 2)
    maml = fm.MAML(model, F.cross_entropy, 0.1, 2, plan="factored", chunk_size=1)
    told = maml.explain(tasks)
    with LiveBytes() as live:
        maml.value_and_grad(tasks)
    assert abs(told.peak / live.peak - 1) <= 0.02
    assert live.peak <= 1.2 * 4 * 512 * 512  # the gradient, which a second one of all tasks before would double


RESIDENT = """
import json, sys
from tests.engine.test_budget import F, fm, wide
from tests.process_memory import high_water, settle
model, tasks = wide(2000)
maml, found = fm.MAML(model, F.cross_entropy, 0.1, 16, executor="reference", chunk_size=6), []
for maml.memory_budget in map(int, sys.argv[1:]):
    told = maml.explain(tasks)
    maml.value_and_grad(tasks)
    before = settle()
    maml.value_and_grad(tasks)
    found.append([told.peak, high_water() - before])
print(json.dumps(found))
"""


@needs_a_mark
def test_the_prediction_is_what_the_process_takes() -> None:
    found = in_a_process(RESIDENT, 1 << 30, 120 << 20, 45 << 20)
    assert len({predicted for predicted, _ in found}) == 3
    for predicted, measured in found:  # what operations and the allocator hold beside tensors is not counted
        assert abs(predicted / measured - 1) <= 0.15


def test_the_native_executor_puts_fewer_tasks_to_work(extension: object, set_threads: Any) -> None:
    set_threads(4)
    model, tasks = wide()
    free = fm.MAML(model, F.cross_entropy, 0.1, 2, executor="native")
    told = free.explain(tasks)
    assert told.tasks_at_once == 4
    work, programs = free.prepare(tasks)
    one = programs.native.workspace_bytes(work, learned=False)
    beside = told.peak - 4 * one  # packed weights, sums and the gradient
    assert beside > 0
    for at_once in (3, 2, 1):
        maml = fm.MAML(model, F.cross_entropy, 0.1, 2, executor="native", memory_budget=beside + at_once * one)
        less = maml.explain(tasks)
        assert (less.tasks_at_once, less.peak) == (at_once, beside + at_once * one)
        loss, gradients = maml.value_and_grad(tasks)
        truth_loss, truth = free.value_and_grad(tasks)
        assert torch.equal(loss, truth_loss)
        assert all(torch.equal(gradients[n], truth[n]) for n in truth)


def test_a_long_inner_loop_leaves_the_native_executor_where_only_computing_again_fits(extension: object) -> None:
    model, tasks = wide()
    model, tasks = model.double(), fm.TaskBatch(*((x.double(), y) for x, y in (tasks.support, tasks.query)))
    steps = 12
    free = fm.MAML(model, F.cross_entropy, 0.05, steps)
    least = free.explain(tasks).peak // free.explain(tasks).tasks_at_once
    maml = fm.MAML(model, F.cross_entropy, 0.05, steps, memory_budget=least // 2)
    told = maml.explain(tasks)
    assert told.recomputes
    assert told.peak <= least // 2
    assert "because one task alone would take more than the memory budget on the native one" in str(told)
    assert "activations computed again" in str(told)
    loss, gradients = maml.value_and_grad(tasks)
    truth_loss, truth = free.value_and_grad(tasks)
    # float64, 12 steps of two executors that add in different orders
    assert relative_error(loss, truth_loss) <= 1e-10
    assert relative_error(gradients, truth) <= 1e-9


@pytest.mark.parametrize("executor", ["auto", "reference"])
def test_a_budget_that_nothing_fits_warns_once_and_runs(executor: str) -> None:
    model, tasks = wide()
    maml = fm.MAML(model, F.cross_entropy, 0.1, 2, executor=executor, memory_budget=TINY)
    with pytest.warns(UserWarning, match="memory_budget is 1 bytes, but one task at a time takes [0-9]+: a budget of"):
        _, gradients = maml.value_and_grad(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, again = maml.value_and_grad(tasks)
    _, truth = fm.MAML(model, F.cross_entropy, 0.1, 2).value_and_grad(tasks)
    # float32, and sums over 400 samples in different orders
    assert relative_error(gradients, truth) <= 1e-5
    assert relative_error(again, truth) <= 1e-5


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
def test_what_draws_random_numbers_is_not_computed_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    tasks = tasks_of((4,))
    maml = fm.MAML(model, F.cross_entropy, 0.1, 2, executor="reference", chunk_size=1, memory_budget=TINY)
    assert not maml.explain(tasks).recomputes
    results = []
    for learner in (maml, fm.MAML(model, F.cross_entropy, 0.1, 2, executor="reference", chunk_size=1)):
        torch.manual_seed(7)  # what runs beforehand to be counted must not be seen in it
        results.append(learner.value_and_grad(tasks)[1])
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_evaluation_and_another_number_of_steps_have_fits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = wide()
    counted: list[tuple[int, bool]] = []
    real = meta_step.predicted

    def predicted(work: Any, programs: Any, cotangents: Any, **options: Any) -> Any:
        counted.append((work.steps, cotangents is not None))
        return real(work, programs, cotangents, **options)

    monkeypatch.setattr(meta_step, "predicted", predicted)
    maml = fm.MAML(model, F.cross_entropy, 0.1, 2, executor="reference", memory_budget=1 << 30)
    for _ in range(2):
        maml.value_and_grad(tasks)
        maml.value_and_grad(tasks, steps=3)
        with torch.no_grad():
            maml(tasks)
    assert counted == [(2, True), (3, True), (2, False)]  # without gradients, none is computed


def test_a_task_that_is_too_much_ends_the_count() -> None:
    model, tasks = wide()
    maml = fm.MAML(model, F.cross_entropy, 0.1, 4, executor="reference", chunk_size=T)
    work, programs = maml.prepare(tasks)
    counts: list[int] = []

    def run(part: Any, at_once: int, recompute: bool) -> None:
        counts.append(part.tasks)
        torch.empty(4000 // part.tasks)  # a count that goes down says that something else was counted

    options = {"recompute": False, "outputs": False}
    peak = Peak.of(work, programs, run, limit=10_000, **options)
    assert counts == [1]
    assert peak.most(10_000, T) == 0
    assert Peak.of(work, programs, run, **options).more == 0


@pytest.mark.usefixtures("extension")
def test_wide_weights_are_not_formed_where_the_budget_is_too_small_for_one_task_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "known", lambda: rates.Rates(last=1 << 26))  # else factors take less time
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3)).double()
    tasks = tasks_of((64,), support=2)
    free = fm.MAML(model, F.cross_entropy, 0.1, 6)
    told = free.explain(tasks)
    assert told.executor.startswith("native")
    assert {row.plan for row in told.rows} >= {"resident"}
    budget = told.peak // told.tasks_at_once - 1
    maml = fm.MAML(model, F.cross_entropy, 0.1, 6, memory_budget=budget)
    less = maml.explain(tasks)
    assert "with weights of its own one task takes" in less.executor
    assert "factored" in {row.plan for row in less.rows}
    assert less.peak <= budget
    _, gradients = maml.value_and_grad(tasks)
    _, truth = free.value_and_grad(tasks)
    assert relative_error(gradients, truth) <= 1e-9


@pytest.mark.parametrize(("budget", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_budgets_that_are_none(budget: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="memory_budget must be"):
        fm.MAML(nn.Linear(1, 1), F.mse_loss, memory_budget=budget)


def test_autodiff_knows_no_budget() -> None:
    with pytest.raises(ValueError, match="memory_budget must be None with engine='autodiff', got 5"):
        fm.MAML(nn.Linear(1, 1), F.mse_loss, memory_budget=5, engine="autodiff")


def test_live_bytes_are_those_of_storages_that_live() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        a = before * 2
        assert live.now == 4000
        views: list[Tensor] = [a[:10], a.view(10, 100), before.t()]
        before.add_(1)
        assert live.now == 4000
        b = torch.zeros(500, dtype=torch.float64)
        assert (live.now, live.peak) == (8000, 8000)
        del a
        assert live.now == 8000  # a view still holds it
        views.clear()
        assert (live.now, live.peak) == (4000, 8000)
        del b
        assert (live.now, live.peak) == (0, 8000)


def test_live_bytes_stop_at_their_limit() -> None:
    with LiveBytes(5000):
        kept = torch.zeros(1000)
        with pytest.raises(Exceeded, match="5000 must be enough, got 8000"):
            torch.zeros(1000)
        assert kept.sum() == 0

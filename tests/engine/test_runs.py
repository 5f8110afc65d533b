"""A profile of whole meta-steps: what it counts is what ran, it changes no bit, and without one nothing is called."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Barrier
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import fastmeta as fm
from fastmeta.core import native
from fastmeta.engine import runs, timed
from fastmeta.engine.cost import MAPS
from fastmeta.engine.profile import Profile, collect, collecting
from fastmeta.engine.runs import Kind, Runs
from fastmeta.engine.timed import Clock, Tally
from fastmeta.ops.activation.op import Activation
from fastmeta.ops.linear.op import Linear

TASKS, STEPS, RUNS = 4, 3, 2
needs_native = pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")


def net(layers: int = 2) -> nn.Module:
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(5, 5), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(5, 3))


def batch(n: int = 4) -> fm.TaskBatch:
    made = [(torch.randn(TASKS, n + i, 5), torch.randint(3, (TASKS, n + i))) for i in range(2)]
    return fm.TaskBatch(*made)


def learner(**more: Any) -> fm.MAML:
    return _learner(tuple(more.items()))


@cache
def _learner(more: tuple[tuple[str, Any], ...]) -> fm.MAML:
    """One for all tests: tracing takes longest."""
    return fm.MAML(net(), F.cross_entropy, **{"lr": 0.1, "steps": STEPS, "executor": "reference", **dict(more)})


def profiled(maml: fm.MAML, tasks: fm.TaskBatch, times: int = RUNS, **more: Any) -> fm.profile:
    with fm.profile(**more) as prof:
        for _ in range(times):
            maml.value_and_grad(tasks)
    return prof


def kinds(prof: fm.profile) -> list[Kind]:
    return prof._runs().kinds


def maps(prof: fm.profile) -> dict[tuple[str, str, str, str], tuple[int, int, int]]:
    """Calls, operations and bytes by layer, operation, part and map."""
    records = prof._profile.records_of(kinds(prof)[0])
    return {(r.module, r.operation, r.part, r.map): (r.calls, r.flops, r.bytes) for r in records}


def test_calls_are_those_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    maml, tasks = learner(chunk_size=2), batch()
    called: Counter[tuple[str, str]] = Counter()

    def counted(run: Any, key: tuple[str, str]) -> Any:
        def counts(*args: Any) -> Any:
            called[key] += 1
            return run(*args)

        return counts

    for op in (Linear, Activation):
        for name in MAPS:
            monkeypatch.setattr(op, name, counted(getattr(op, name), (op.name, name)))
    prof = profiled(maml, tasks)
    found: Counter[tuple[str, str]] = Counter()
    for (_, operation, _, name), (calls, _, _) in maps(prof).items():
        if operation in ("linear", "activation"):
            found[operation, name] += calls
    assert found == called
    chunks = TASKS // 2
    assert found["linear", "forward"] == RUNS * chunks * (STEPS + 1) * 2
    assert maps(prof)["0", "linear", "query", "backward"][0] == RUNS * chunks
    assert maps(prof)["0", "linear", "adjoint", "tangent_backward"][0] == RUNS * chunks * STEPS


def test_operations_are_those_of_explain() -> None:
    maml, tasks = learner(), batch()
    assert sum(flops for _, flops, _ in maps(profiled(maml, tasks)).values()) == RUNS * maml.explain(tasks).flops


@needs_native
def test_both_executors_count_the_same_operations_and_bytes() -> None:
    tasks = batch()
    ours, plain = (maps(profiled(learner(executor=name), tasks)) for name in ("native", "reference"))
    last = {key[2:]: value[1:] for key, value in ours.items() if key[0] == "2"}
    assert last == {key[2:]: value[1:] for key, value in plain.items() if key[0] == "2"}
    assert len(last) == 6


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 1e9 else 2 * x


LEARNERS = {
    "reference": lambda: learner(),
    "native": lambda: learner(executor="native"),
    "momentum": lambda: learner(inner=fm.inner.SGD(0.1, momentum=0.9), executor="auto", lr=None),
    "recomputed": lambda: learner(memory_budget=1),
    "autodiff": lambda: learner(engine="autodiff"),
    "IMAML": lambda: fm.IMAML(net(), F.cross_entropy, lr=0.1, steps=STEPS),
    "MAML++": lambda: fm.MAMLPlusPlus(net(), F.cross_entropy, lr=0.1, steps=STEPS),
    "Reptile": lambda: fm.Reptile(net(), F.cross_entropy, lr=0.1, steps=STEPS),
}


@pytest.mark.filterwarnings("ignore:.*memory_budget")
@pytest.mark.parametrize("name", [n if n != "native" else pytest.param(n, marks=needs_native) for n in LEARNERS])
def test_a_profiled_gradient_has_the_same_bits(name: str) -> None:
    maml, tasks = LEARNERS[name](), batch()
    loss, plain = maml.value_and_grad(tasks)
    with fm.profile() as prof:
        seen, gradient = maml.value_and_grad(tasks)
    assert torch.equal(loss, seen)
    assert all(torch.equal(plain[key], gradient[key]) for key in plain)
    assert torch.equal(maml.value_and_grad(tasks)[0], loss)
    (kind,) = kinds(prof)
    assert (kind.runs, kind.tasks, kind.samples) == (1, TASKS, (4, 5))
    assert kind.executor == {"autodiff": "autodiff", "native": "native"}.get(name, "reference")
    assert 0 < kind.busy <= kind.seconds <= prof._runs().timeline.seconds
    times = [r.seconds for r in prof._profile.records_of(kind)]
    assert min(times, default=0) >= 0
    assert sum(times) <= kind.threads * kind.seconds
    assert bool(times) == (name != "autodiff")


def test_where_the_time_of_a_training_loop_goes() -> None:
    maml, tasks = learner(), batch()
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1)
    with fm.profile() as prof:
        for _ in range(3):
            optimizer.zero_grad()
            maml(tasks).loss.backward()
            optimizer.step()
        with torch.no_grad():
            maml(tasks)
        maml.adapt(tasks)
    line = prof._runs().timeline
    once = ["preparation", "meta-step", "backward", "outer step"]
    names = [span.name for span in line.spans if span.name != "profile"]
    assert names == 3 * once + 2 * ["preparation", "evaluation"]
    assert sum(line.totals.values()) == pytest.approx(line.seconds, rel=1e-9)
    assert line.totals["between meta-steps"] == 0
    assert [(kind.gradient, kind.samples) for kind in kinds(prof)] == [(True, (4, 5)), (False, (4, 5)), (False, (4, 0))]
    assert [run.kind for run in prof._runs().every] == [0, 0, 0, 1, 2]
    assert all(run.resident > 0 for run in prof._runs().every) == Path("/proc/self/statm").exists()


def test_another_objective_runs_a_second_meta_step_in_backward() -> None:
    maml, tasks = learner(), batch()
    with fm.profile() as prof:
        out = maml(tasks)
        out.task_losses[0].backward()
    assert kinds(prof)[0].runs == 2
    assert [s.name for s in prof._runs().timeline.spans if s.name != "profile"] == [
        *("preparation", "meta-step", "meta-step", "backward")
    ]
    with fm.profile() as prof:
        out = maml(tasks)
    out.loss.backward()  # after the profile has ended
    assert sum(kind.runs for kind in kinds(prof)) == 1


def test_autodiff_says_why() -> None:
    maml = fm.MAML(nn.Sequential(nn.Linear(5, 3), Odd()), F.cross_entropy, steps=1)
    with pytest.warns(UserWarning, match="autodiff"):
        prof = profiled(maml, batch())
    (kind,) = kinds(prof)
    assert kind.executor == "autodiff"
    assert kind.why
    assert prof._runs().timeline.totals["backward"] > 0


def test_a_failing_meta_step_leaves_the_profile_whole() -> None:
    maml = learner(check_finite=True)
    bad = fm.TaskBatch((torch.full((TASKS, 4, 5), torch.nan), torch.zeros(TASKS, 4).long()), batch().query)
    with fm.profile() as prof:
        maml.value_and_grad(batch())
        with pytest.raises(ValueError, match="finite"):
            maml.value_and_grad(bad)
        maml.value_and_grad(batch())
    assert sum(kind.runs for kind in kinds(prof)) == 2
    assert prof._runs().timeline.totals["meta-step"] > 0
    assert prof._runs().clock.own.within is False


def test_the_optimizer_hooks_go_with_the_block_and_a_failing_step_is_closed() -> None:
    before = len(torch_optimizer._global_optimizer_pre_hooks), len(torch_optimizer._global_optimizer_post_hooks)
    weight = nn.Parameter(torch.ones(2))
    good, bad = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)

    def closure() -> Tensor:
        raise KeyError("no")

    with fm.profile() as prof:
        with pytest.raises(KeyError):
            bad.step(closure)
        good.step()
    assert [span.name for span in prof._runs().timeline.spans] == ["outer step"] * 2
    assert before == (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )
    assert collecting() is None


def calls_into_the_profile(maml: fm.MAML, tasks: fm.TaskBatch) -> Counter[str]:
    """Python calls of functions of the profile's modules in one meta-step."""
    folder = Path(runs.__file__).parent
    own = {str(folder / f"{name}.py") for name in ("profile", "runs", "timed", "timeline")}
    own |= {str(p) for p in (folder.parent / "profiling").glob("*.py")}
    found: Counter[str] = Counter()

    def see(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename in own:
            found[frame.f_code.co_name] += 1

    sys.setprofile(see)
    try:
        maml.value_and_grad(tasks)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("executor", ["reference", pytest.param("native", marks=needs_native)])
def test_without_a_profile_no_operation_calls_anything_of_it(executor: str) -> None:
    tasks = batch()
    found = []
    for steps, layers in ((1, 1), (5, 3)):
        maml = fm.MAML(net(layers), F.cross_entropy, lr=0.1, steps=steps, executor=executor)
        maml.value_and_grad(tasks)
        profiled(maml, tasks)
        found.append(calls_into_the_profile(maml, tasks))
    assert found[0] == found[1]  # the same for every number of steps and operations
    assert set(found[0]) == {"watching", "collecting"}
    assert found[0].total() <= 5


def test_a_profile_leaves_the_operations_as_they_were() -> None:
    maml, tasks = learner(), batch()
    prof = profiled(maml, tasks)
    programs = kinds(prof)[0].programs
    assert programs is not None
    for instruction in (*programs.support.instructions, *programs.both[1].instructions):
        assert not set(MAPS) & set(vars(instruction.op))


def test_threads_that_run_at_once_are_each_counted() -> None:
    maml, tasks = learner(), batch()
    maml.value_and_grad(tasks)
    profile = Profile()
    profile.watch(Runs(lambda: profile.seconds))
    both = Barrier(2)

    def run(_: int) -> None:
        with collect(profile):
            both.wait()
            for _ in range(3):
                maml.value_and_grad(tasks)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert profile.runs is not None
    profile.runs.end()
    (kind,) = profile.runs.kinds
    assert kind.runs == 6
    calls = {(r.part, r.map): r.calls for r in profile.records_of(kind) if r.operation == "linear" and r.module == "0"}
    assert calls["inner loop", "forward"] == calls["adjoint", "tangent"] == 6 * STEPS
    assert calls["query", "forward"] == 6
    assert profile.runs.timeline.spans == []  # of the thread that made the profile


def test_whole_meta_steps_alone() -> None:
    prof = profiled(learner(), batch(), operations=False)
    (kind,) = kinds(prof)
    assert maps(prof) == {}
    assert kind.busy == pytest.approx(kind.seconds)


def test_the_profile_keeps_no_task_alive() -> None:
    maml, tasks = learner(), batch()
    prof = profiled(maml, tasks)
    work = kinds(prof)[0].work
    assert {leaf.device.type for leaf in (*work.support, *work.query)} == {"meta"}
    assert all(p.grad_fn is None for p in work.parameters.values())


def test_kinds_differ_by_what_runs() -> None:
    maml = learner()
    with fm.profile() as prof:
        maml.value_and_grad(batch())
        maml.value_and_grad(batch(6))
        maml.value_and_grad(batch(), steps=1)
        maml.value_and_grad(batch())
    assert [kind.runs for kind in kinds(prof)] == [2, 1, 1]


class Event:
    """Stands for a CUDA event on a device that runs behind the processor."""

    clock = 0.0
    passed = 0.0

    def __init__(self) -> None:
        Event.clock += 1.5
        self.at = Event.clock

    def query(self) -> bool:
        return self.at <= Event.passed

    def synchronize(self) -> None:
        Event.passed = max(Event.passed, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert self.query()
        assert other.query()
        return other.at - self.at


def test_events_are_read_when_the_device_has_passed_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "_event", Event)
    monkeypatch.setattr(timed, "PENDING", 2)
    clock, first, second = Clock(), Tally(), Tally()
    clock.end(clock.begin(True), first, second)
    Event.passed = Event.clock
    clock.end(clock.begin(True), second)
    assert (first.seconds, second.seconds) == (1.5e-3, 1.5e-3)  # the other one is under way
    clock.settle()
    assert second.seconds == 3e-3
    clock.settle()
    assert second.seconds == 3e-3


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    maml, tasks = learner().cuda(), batch().to("cuda")
    prof = profiled(maml, tasks, 4)
    (kind,) = kinds(prof)
    assert kind.executor == "reference"
    assert 0 < kind.busy <= kind.device.seconds
    assert all(r.seconds > 0 for r in prof._profile.records_of(kind))
    prof = profiled(maml, tasks, 4, operations=False)
    (kind,) = kinds(prof)
    assert kind.executor == "captured"
    assert kind.busy == kind.device.seconds > 0

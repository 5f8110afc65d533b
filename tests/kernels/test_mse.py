"""Mean squared error's Triton kernels: every map in float32 against torch.func in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastmeta.core.task_op import Need
from fastmeta.ops.mse import MSE
from fastmeta.ops.mse.reference import MEAN, NONE, SUM
from tests.kernels import running
from tests.kernels.maps import EPS, check, runs, some
from tests.ops.four_maps import A, Case, Maps, Run, Truth

pytestmark = pytest.mark.usefixtures("nan_poison")

mse = torch.ops.aten.mse_loss.default


def case(name: str, shape: tuple[int, ...], reduction: int) -> Case:
    return Case(name, mse, (A(shape), A(shape), reduction))


CASES = [
    case("rows", (10, 3), MEAN),
    case("sum", (2, 3, 5), SUM),
    case("vector", (7,), MEAN),
    case("number", (), MEAN),
    case("one", (1, 1), SUM),
    case("many-blocks", (5, 301), MEAN),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> None:
    own = MSE._on_gpu
    monkeypatch.setattr(MSE, "_on_gpu", lambda self, x: self.reduction != NONE or own(self, x))
    running.device()


@pytest.mark.parametrize("layout", ["plain", "strided", "expanded", "repeated"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_map(case: Case, layout: str) -> None:
    run, wide = runs(case, layout)
    with running.reversed_programs():
        got = run.maps()
    assert run.op.backend == "triton"
    check(got, wide.expected(), math.prod(case.args[0].shape))


def test_one_task() -> None:
    run, wide = runs(CASES[0], tasks=1)
    check(run.maps(), wide.expected(), 30)


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
def test_missing_tangents_and_cotangents_are_zero(present: tuple[bool, ...]) -> None:
    run, wide = runs(CASES[0])
    for d, d_dot in ((True, True), (False, True), (True, False)):
        arguments = [
            (some(one.x_dot, present), some(one.d_y, (d,)), some(one.d_y_dot, (d_dot,))) for one in (run, wide)
        ]
        check(run.maps(*arguments[0]), wide.expected(*arguments[1]), 30)


def test_nothing_comes_of_no_cotangents() -> None:
    run, _ = runs(CASES[0])
    _, saved = run.op.forward(run.x)
    _, saved_dot = run.op.tangent(saved, run.x_dot)
    assert run.op.backward(saved, (None,), run.need) == (None, None)
    assert run.op.tangent_backward(saved, saved_dot, (None,), (None,), run.need) == (None, None)
    assert run.op.tangent_backward(saved, (None,), run.d_y, (None,), run.need) == (None, None)


@pytest.mark.parametrize("wanted", range(2))
def test_one_cotangent_alone(wanted: int) -> None:
    run, wide = runs(CASES[0])
    run.need = [Need.TASK if i == wanted else Need.NONE for i in range(2)]
    got, want = run.maps(), wide.expected()
    for values, truths in ((got.backward, want.backward), (got.tangent_backward, want.tangent_backward)):
        assert not values[1 - wanted].any()
        check(Maps((), [values[wanted]], [], []), Maps((), [truths[wanted]], [], []), 30)


@pytest.mark.parametrize("apart", range(6))
def test_values_of_one_task_that_stand_for_all(apart: int) -> None:
    """As labels that all tasks share, or the cotangent of a sum over tasks: each alone, beside others that differ."""
    run, wide = runs(CASES[0])
    for one in (run, wide):
        names = [(one.x, 0), (one.x, 1), (one.x_dot, 0), (one.x_dot, 1), (one.d_y, 0), (one.d_y_dot, 0)]
        values, i = names[apart]
        values[i] = values[i][:1].expand(values[i].shape)
    wide.truth = Truth(CASES[0], wide.call, wide.x, wide.tasks)
    for present in ((True, True), (True, False)):
        check(run.maps(some(run.x_dot, present)), wide.expected(some(wide.x_dot, present)), 30)


@pytest.mark.parametrize("over", [0, 1])
def test_tasks_of_more_elements_than_a_program_adds_up(over: int) -> None:
    from fastmeta.ops.mse import triton

    count = 2 * triton.SPAN + over
    x, y, x_dot, y_dot = (torch.randn(2, count) for _ in range(4))
    there = running.device()
    with running.reversed_programs():
        loss, e = triton.forward(x.to(there), y.to(there), SUM)
        l_dot, e_dot = triton.tangent(e, x_dot.to(there), y_dot.to(there), 1.0)
    bound = EPS * (20 + 8 * math.sqrt(count))
    difference, moved = x.double() - y.double(), x_dot.double() - y_dot.double()
    assert torch.equal(e.cpu(), x - y)
    assert torch.equal(e_dot.cpu(), x_dot - y_dot)
    scale = difference.square().sum(1)
    assert ((loss.cpu() - scale).abs() <= bound * scale).all()
    lengths = 2 * difference.norm(dim=1) * moved.norm(dim=1)
    assert ((l_dot.cpu() - 2 * (difference * moved).sum(1)).abs() <= bound * lengths).all()


def test_the_same_call_gives_the_same_bits() -> None:
    from fastmeta.ops.mse import triton

    x, y = (torch.randn(3, triton.SPAN + 5, device=running.device()) for _ in range(2))
    first = triton.forward(x, y, MEAN)[0]
    with running.reversed_programs():
        assert torch.equal(triton.forward(x, y, MEAN)[0], first)


@pytest.mark.parametrize("reduction", [MEAN, SUM])
def test_no_tasks_and_no_elements(reduction: int) -> None:
    for tasks, shape in ((0, (4, 3)), (2, (0, 3))):
        run = Run(case("few", shape, reduction), dtype=torch.float32)
        x = [v[:tasks].to(running.device()) for v in run.x]
        (loss,), saved = run.op.forward(x)
        (l_dot,), saved_dot = run.op.tangent(saved, x)
        d = run.op.backward(saved, (loss,), run.need)
        d_dot = run.op.tangent_backward(saved, saved_dot, (loss,), (loss,), run.need)
        assert loss.shape == l_dot.shape == (tasks,)
        assert loss.isnan().all() if reduction == MEAN and tasks else not loss.any()
        assert not l_dot.any()
        assert [v.shape for v in d] == [v.shape for v in d_dot] == [v.shape for v in x]


def test_unreduced_losses_are_pytorchs() -> None:
    run, wide = runs(case("none", (4, 3), NONE))
    got = run.maps()
    assert run.op.backend == "reference"
    check(got, wide.expected(), 1)


def test_kernels_are_for_a_gpu(monkeypatch) -> None:
    monkeypatch.undo()
    run = Run(CASES[0], dtype=torch.float32)
    run.maps()
    assert run.op.backend == "reference"


def test_builds_name_every_argument() -> None:
    from fastmeta.ops.mse import triton

    builds = triton.shipped()
    assert len({build.name for build in builds}) == len(builds)
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in builds)

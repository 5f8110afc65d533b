"""Softmax's Triton kernels: every map in float32 against torch.func in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from fastmeta.core.task_op import Call, Need
from fastmeta.ops.softmax import LogSoftmax, Softmax
from fastmeta.ops.softmax.op import WIDEST, _AlongAxis
from tests.kernels import running
from tests.kernels.maps import EPS, check, runs
from tests.ops.four_maps import A, Case, distance

pytestmark = pytest.mark.usefixtures("nan_poison")

aten = torch.ops.aten
KINDS = [(aten.softmax.int, Softmax), (aten.log_softmax.int, LogSoftmax)]
SHAPES = [(1,), (5,), (70, 33), (2, 3, 4, 6), (2, 1100), (1, 2500)]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> torch.device:
    monkeypatch.setattr(_AlongAxis, "_on_gpu", lambda self, x: self.fits_kernels)
    return running.device()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", [target for target, _ in KINDS], ids=str)
def test_every_map(target, shape) -> None:
    case = Case("kernel", target, (A(shape), -1))
    for layout, tasks in (("plain", 1), ("strided", 3), ("expanded", 2)):
        run, wide = runs(case, layout, tasks=tasks)
        with running.reversed_programs():
            check(run.maps(), wide.expected(), shape[-1])
        assert run.op.backend == "triton"


@pytest.mark.parametrize("target", [target for target, _ in KINDS], ids=str)
def test_missing_tangents_and_cotangents_are_zero(target) -> None:
    run, wide = runs(Case("kernel", target, (A((4, 7)), -1)))
    for x_dot in (run.x_dot, [None]):
        for d, d_dot in ((True, False), (False, True), (False, False)):
            given = [([one.d_y[0] if d else None], [one.d_y_dot[0] if d_dot else None]) for one in (run, wide)]
            dots = [None if x_dot == [None] else one.x_dot for one in (run, wide)]
            if x_dot == [None]:
                assert run.op.tangent((run.x[0],), (None,)) == ((None,), (None,))
            check(run.maps(dots[0], *given[0]), wide.expected(dots[1], *given[1]), 7)


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_what_is_unknown_comes_to_nothing(target, kind) -> None:
    op = kind(Call.example(target, torch.zeros(4), -1))
    d = torch.randn(2, 4, device=running.device())
    _, (p,) = op.forward([d])
    for d_y, y_dot in ((d, None), (None, d), (None, None)):
        assert op.tangent_backward((p,), (y_dot,), (d_y,), (None,), [Need.TASK]) == (None,)


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_numbers_that_are_none_are_as_torch_has_them(target, kind) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor(
        [[[-inf, -inf, -inf], [0.0, -inf, 1.0], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [-inf, nan, nan], [3e38, -3e38, 0.0]]]
    )
    op = kind(Call.example(target, x[0], -1))
    (y,), (p,) = op.forward([x.to(running.device())])
    torch.testing.assert_close(y.cpu(), torch.ops.aten.__getattr__(kind.name).int(x, -1), equal_nan=True)
    torch.testing.assert_close(p.cpu(), torch.softmax(x, -1), equal_nan=True)


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_large_scores_keep_their_digits(target, kind) -> None:
    """An exponential of a score itself would overflow."""
    x = 30 * torch.randn(1, 4, 64) + 3e3
    op = kind(Call.example(target, x[0], -1))
    (y,), _ = op.forward([x.to(running.device())])
    want = target(x.double(), -1)
    assert distance(y.cpu(), want) <= 100 * EPS  # the argument of an exponential is rounded too


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_other_axes_and_wider_rows_are_pytorchs(target, kind) -> None:
    for shape, dim, kernels in (
        ((3, 5), -1, True),
        ((3, 5), 1, True),
        ((3, 5), 0, False),
        ((3, WIDEST), -1, True),
        ((3, WIDEST + 1), -1, False),
        ((3, 0), -1, False),
    ):
        op = kind(Call.example(target, torch.zeros(shape), dim))
        assert op.fits_kernels is kernels
    run, wide = runs(Case("turned", target, (A((3, 5)), 0)))
    check(run.maps(), wide.expected(), 3)
    assert run.op.backend == "reference"


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_no_tasks_and_no_rows(target, kind) -> None:
    for shape in ((0, 2, 5), (2, 0, 5)):
        op = kind(Call.example(target, torch.zeros(shape[1:]), -1))
        x = torch.zeros(shape, device=running.device())
        (y,), saved = op.forward([x])
        (y_dot,), saved_dot = op.tangent(saved, (x,))
        (d,) = op.backward(saved, (y,), [Need.TASK])
        (d_dot,) = op.tangent_backward(saved, saved_dot, (y,), (y_dot,), [Need.TASK])
        assert y.shape == y_dot.shape == d.shape == d_dot.shape == shape


def test_a_cpu_runs_the_reference(monkeypatch) -> None:
    monkeypatch.undo()
    op = Softmax(Call.example(aten.softmax.int, torch.zeros(4), -1))
    op.forward([torch.zeros(2, 4)])
    assert op.backend == "reference"


def test_builds_name_every_argument() -> None:
    from fastmeta.ops.softmax import triton

    builds = triton.shipped()
    assert len({build.name for build in builds}) == len(builds)
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in builds)

"""Layer norm's Triton kernels: every map in float32 against torch.func in float64, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastmeta.core.task_op import Need
from fastmeta.ops.layer_norm import LayerNorm
from tests.kernels import running
from tests.kernels.maps import EPS, check, runs, some
from tests.ops.four_maps import A, Case, Maps, Run, distance

pytestmark = pytest.mark.usefixtures("nan_poison")

layer_norm = torch.ops.aten.layer_norm.default


def case(name: str, shape: tuple[int, ...], features: list[int], scale: bool = True, shift: bool = True) -> Case:
    parameter = A(tuple(features), shift=1.0)
    return Case(
        name, layer_norm, (A(shape), features, parameter if scale else None, parameter if shift else None, 1e-5)
    )


CASES = [
    case("one-block", (4, 5), [5]),
    case("many-rows", (70, 33), [33]),
    case("two-axes", (2, 3, 5), [3, 5]),
    case("wide", (2, 1100), [1100]),
    case("no-shift", (7, 9), [9], shift=False),
    case("no-scale", (7, 9), [9], scale=False),
    case("plain", (7, 9), [9], scale=False, shift=False),
    case("one-feature", (3, 1), [1]),
]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> torch.device:
    monkeypatch.setattr(LayerNorm, "_on_gpu", lambda self, x: True)
    return running.device()


def longest(case: Case) -> int:
    return math.prod(case.args[0].shape)


@pytest.mark.parametrize("layout", ["plain", "strided", "expanded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_map(case: Case, layout: str) -> None:
    run, wide = runs(case, layout)
    with running.reversed_programs():
        got = run.maps()
    check(got, wide.expected(), longest(case))


@pytest.mark.parametrize("present", [p for p in itertools.product((False, True), repeat=3) if any(p)])
def test_missing_tangents_and_cotangents_are_zero(present: tuple[bool, ...]) -> None:
    run, wide = runs(CASES[0])
    for d, d_dot in ((True, True), (False, True), (True, False)):
        arguments = [
            (some(one.x_dot, present), some(one.d_y, (d,)), some(one.d_y_dot, (d_dot,))) for one in (run, wide)
        ]
        check(run.maps(*arguments[0]), wide.expected(*arguments[1]), longest(CASES[0]))


@pytest.mark.parametrize("wanted", range(3))
def test_one_cotangent_alone(wanted: int) -> None:
    run, wide = runs(CASES[1])
    run.need = [Need.TASK if i == wanted else Need.NONE for i in range(3)]
    got, want = run.maps(), wide.expected()
    for values, truths in ((got.backward, want.backward), (got.tangent_backward, want.tangent_backward)):
        assert all(not v.any() for i, v in enumerate(values) if i != wanted)
        check(Maps((), [values[wanted]], [], []), Maps((), [truths[wanted]], [], []), longest(CASES[1]))


def test_rows_far_from_zero_keep_their_digits() -> None:
    """A variance as the difference of two squares would have none left."""
    from fastmeta.ops.layer_norm import triton

    z = torch.randn(1, 4, 64) + 3e3
    _, x, _ = triton.forward(z.to(running.device()), None, None, 1e-5)
    want = torch.nn.functional.layer_norm(z.double(), [64])
    assert distance(x.cpu(), want) <= 3e3 * 4 * EPS  # of the row's mean


def test_no_tasks_and_no_rows() -> None:
    for tasks, case_ in ((0, CASES[0]), (2, case("no-rows", (0, 5), [5]))):
        run = Run(case_, dtype=torch.float32)
        x = [v[:0].to(running.device()) if tasks == 0 else v.to(running.device()) for v in run.x]
        (y,), saved = run.op.forward(x)
        (y_dot,), saved_dot = run.op.tangent(saved, x)
        d = run.op.backward(saved, (y,), run.need)
        d_dot = run.op.tangent_backward(saved, saved_dot, (y,), (y_dot,), run.need)
        assert y.shape == y_dot.shape == x[0].shape
        assert [v.shape for v in d] == [v.shape for v in d_dot] == [v.shape for v in x]
        assert not any(v.any() for v in d)


def test_builds_name_every_argument() -> None:
    from fastmeta.ops.layer_norm import triton

    builds = triton.shipped()
    assert len({build.name for build in builds}) == len(builds)
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in builds)

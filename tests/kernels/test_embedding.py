"""The embedding's Triton kernels: every map in float32 against torch.func in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fastmeta.core.task_op import Need
from fastmeta.ops.embedding import Embedding, reference
from tests.kernels import running
from tests.kernels.maps import EPS, check, runs, some
from tests.ops.four_maps import A, Case

pytestmark = pytest.mark.usefixtures("nan_poison")

embedding = torch.ops.aten.embedding.default


def case(name: str, table: tuple[int, int], indices: tuple[int, ...], padding: int = -1) -> Case:
    return Case(name, embedding, (A(table), A(indices, "classes", table[0]), padding))


CASES = [
    case("text", (7, 3), (4, 5)),
    case("padding", (5, 2), (6,), 3),
    case("wide", (4, 70), (9,)),
    case("one-row", (1, 5), (7,)),
    case("one-column", (6, 1), (3, 3)),
    case("number", (3, 4), ()),
]
SMALL = {"SEARCHED": 2, "TILE": 32, "COLUMNS": 16}  # so that lists and rows take many blocks
SETTINGS = {"shipped": {}, "small": SMALL, "sorted": {"LONGEST": 0}, "small-sorted": {**SMALL, "LONGEST": 0}}


@pytest.fixture(params=SETTINGS)
def _setting(request, monkeypatch) -> None:
    running.device()
    from fastmeta.ops.embedding import triton

    for name, value in SETTINGS[request.param].items():
        monkeypatch.setattr(triton, name, value)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch) -> None:
    monkeypatch.setattr(Embedding, "_on_gpu", lambda self, x: True)
    running.device()


def positions(case: Case) -> int:
    return math.prod(case.args[1].shape)


@pytest.mark.usefixtures("_setting")
@pytest.mark.parametrize("need", [None, Need.TASK, Need.SHARED], ids=["own", "shared-own", "shared"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_map(case: Case, need: Need | None) -> None:
    shared = () if need is None else ("weight",)
    run, wide = runs(case, shared=shared, need=need)
    with running.reversed_programs():
        got = run.maps()
    assert run.op.backend == "triton"
    check(got, wide.expected(), 3 * positions(case))


@pytest.mark.parametrize("layout", ["strided", "expanded", "repeated"])
@pytest.mark.parametrize("need", [None, Need.SHARED], ids=["own", "shared"])
def test_layouts(layout: str, need: Need | None) -> None:
    run, wide = runs(CASES[0], layout, shared=() if need is None else ("weight",), need=need)
    check(run.maps(), wide.expected(), 60)


def test_one_task() -> None:
    run, wide = runs(CASES[0], tasks=1)
    check(run.maps(), wide.expected(), 20)


def test_missing_tangents_and_cotangents_are_zero() -> None:
    run, wide = runs(CASES[0])
    for x_dot, d, d_dot in ((True, False, True), (True, True, False), (False, True, True)):
        arguments = [
            (some(one.x_dot, (x_dot,)), some(one.d_y, (d,)), some(one.d_y_dot, (d_dot,))) for one in (run, wide)
        ]
        check(run.maps(*arguments[0]), wide.expected(*arguments[1]), 20)


def test_nothing_is_computed_for_nobody() -> None:
    run, _ = runs(CASES[0])
    _, saved = run.op.forward(run.x)
    assert run.op.backward(saved, run.d_y, (Need.NONE, Need.NONE)) == (None, None)
    assert run.op.tangent(saved, (None, None)) == ((None,), ())


def test_tables_are_read_where_they_lie_and_by_narrow_indices() -> None:
    """Of packed parameters ``[T, P]``, whose tasks lie further apart than a table's elements."""
    from fastmeta.ops.embedding import triton

    packed = torch.randn(2, 50, device=running.device())
    table = packed[:, 7:28].view(2, 7, 3)
    indices = torch.tensor([[6, 0, 6], [1, 5, 0]], dtype=torch.int32, device=packed.device)
    assert torch.equal(triton.rows(table, indices), reference.rows(table, indices))
    d = torch.randn(2, 3, 3, device=packed.device)
    for shared in (False, True):
        got = triton.table_cotangent(d, indices, 7, -1, shared)
        want = reference.table_cotangent(d.double().cpu(), indices.cpu().long(), 7, -1, shared)
        assert (got.cpu() - want).abs().max() <= 4 * EPS * want.abs().max()


@pytest.mark.usefixtures("_setting")
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
@pytest.mark.parametrize("shared", [False, True])
def test_an_index_out_of_range_makes_its_row_nan_and_adds_nothing(wrong: int, shared: bool) -> None:
    from fastmeta.ops.embedding import triton

    there = running.device()
    indices = torch.tensor([[0, wrong, 2], [2, 2, 4]], device=there)
    table = torch.randn((5, 3) if shared else (2, 5, 3), device=there)
    rows = triton.rows(table, indices)
    kept = indices.clone()
    kept[0, 1] = 0
    want = reference.rows(table, kept)
    want[0, 1] = float("nan")
    assert torch.equal(rows.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))
    d = torch.randn(2, 3, 3, device=there)
    got = triton.table_cotangent(d, indices, 5, -1, shared)
    d[0, 1] = 0
    assert torch.allclose(got, reference.table_cotangent(d, kept, 5, -1, shared), rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.usefixtures("_setting")
def test_the_same_call_gives_the_same_bits() -> None:
    from fastmeta.ops.embedding import triton

    there = running.device()
    indices, d = torch.randint(3, (2, 40), device=there), torch.randn(2, 40, 5, device=there)
    first = triton.table_cotangent(d, indices, 3, -1, True)
    with running.reversed_programs():
        assert torch.equal(triton.table_cotangent(d, indices, 3, -1, True), first)


def test_a_list_is_sorted_where_it_is_long(monkeypatch) -> None:
    from fastmeta.ops.embedding import triton

    monkeypatch.setattr(triton, "LONGEST", 6)
    sorts = []
    own = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, **how: sorts.append(how) or own(self, **how))
    there = running.device()
    d, indices = torch.randn(2, 6, 3, device=there), torch.randint(4, (2, 6), device=there)
    triton.table_cotangent(d, indices, 4, -1, False)
    assert sorts == []
    triton.table_cotangent(d, indices, 4, -1, True)  # all tasks' positions are one list
    assert sorts == [{"dim": 1, "stable": True}]


@pytest.mark.usefixtures("_setting")
@pytest.mark.parametrize("shared", [False, True])
def test_no_tasks_and_no_positions(shared: bool) -> None:
    from fastmeta.ops.embedding import triton

    there = running.device()
    for tasks, count in ((0, 4), (2, 0)):
        indices, d = (
            torch.zeros(tasks, count, dtype=torch.long, device=there),
            torch.ones(tasks, count, 3, device=there),
        )
        table = torch.randn((5, 3) if shared else (tasks, 5, 3), device=there)
        assert triton.rows(table, indices).shape == (tasks, count, 3)
        total = triton.table_cotangent(d, indices, 5, -1, shared)
        assert total.shape == table.shape
        assert not total.any()


def test_builds_name_every_argument() -> None:
    from fastmeta.ops.embedding import triton

    builds = triton.shipped()
    assert len({build.name for build in builds}) == len(builds)
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in builds)

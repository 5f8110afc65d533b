"""Convolution: every geometry, both ways of running tasks, both ways of running a tangent's two products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Need, Unsupported
from fastmeta.ops.conv2d import Conv2d, layout, reference
from fastmeta.ops.generic import GenericOp
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

conv2d = torch.ops.aten.conv2d.default
same = torch.ops.aten.conv2d.padding


def case(name, x, w, bias=True, *geometry):
    return Case(name, conv2d, (A(x), A(w), A((w[0],)) if bias else None, *geometry))


CASES = [
    case("3x3", (3, 2, 5, 4), (4, 2, 3, 3), True, [1, 1], [1, 1]),
    case("no-bias", (2, 3, 4, 4), (2, 3, 3, 3), False),
    case("1x1", (2, 3, 3, 5), (4, 3, 1, 1)),
    case("stride", (2, 1, 7, 6), (3, 1, 3, 3), True, [2, 2], [1, 1]),
    case("dilation", (1, 2, 7, 7), (2, 2, 3, 3), True, [1, 2], [2, 1], [2, 1]),
    case("groups", (2, 4, 4, 4), (6, 2, 3, 3), True, [1, 1], [1, 1], [1, 1], 2),
    case("depthwise", (2, 3, 5, 5), (3, 1, 5, 5), False, [1, 1], [2, 2], [1, 1], 3),
    Case("same", same, (A((2, 2, 5, 5)), A((3, 2, 3, 3)), A((3,)), [1, 1], "same")),
    Case("valid", same, (A((2, 2, 5, 5)), A((3, 2, 2, 2)), None, [1, 1], "valid")),
]


NEVER = {"GROUPED_FLOPS": 0, "JOINED_ELEMENTS": 0, "PATCH_SHARE": 0}
STRATEGIES = [
    ("looped", NEVER),
    ("joined", NEVER | {"JOINED_ELEMENTS": 1 << 17}),
    ("grouped", NEVER | {"GROUPED_FLOPS": 1 << 40, "GROUPED_CHANNELS": 1}),
    ("patches", NEVER | {"PATCH_SHARE": 1e9}),
]


def shares(c: Case) -> tuple[str, ...]:
    return ("weight",) if c.args[2] is None else ("weight", "bias")


@pytest.mark.parametrize("c", CASES, ids=str)
def test_four_maps(c):
    four_maps.check_all(c, shares(c))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s[0])
@pytest.mark.parametrize("c", CASES, ids=str)
def test_every_strategy(c, strategy, monkeypatch):
    """Patches, grouped or looped over tasks, joined or separate products: chosen for speed, the same result."""
    for name, value in strategy[1].items():
        monkeypatch.setattr(reference, name, value)
    four_maps.check_all(c, shares(c))


def test_wide_groups(monkeypatch):
    monkeypatch.setattr(layout, "WIDE_CHANNELS", 1)
    monkeypatch.setattr(reference, "JOINED_CHANNELS", 1)
    for name, value in STRATEGIES[2][1].items():
        monkeypatch.setattr(reference, name, value)
    four_maps.check_all(CASES[0], ("weight", "bias"))


@pytest.mark.parametrize("c", CASES, ids=str)
def test_agrees_with_the_generic_operation(c):
    compare(Run(c).maps(), Run(c, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(c))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s[0])
def test_results_keep_channels_last(strategy, monkeypatch):
    for name, value in strategy[1].items():
        monkeypatch.setattr(reference, name, value)
    run = Run(CASES[0], dtype=torch.float32)
    maps = run.maps()
    for value in (maps.forward[0], maps.backward[0], maps.tangent[0], maps.tangent_backward[0]):
        assert value.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@given(
    tasks=st.integers(1, 3),
    n=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    need=st.sampled_from([Need.SHARED, Need.TASK]),
)
def test_drawn_geometries(tasks, n, channels, kernel, extra, stride, padding, need):
    size = [k + e for k, e in zip(kernel, extra, strict=True)]
    c = case("drawn", (n, channels[0], *size), (channels[1], channels[0], *kernel), True, [stride] * 2, [padding] * 2)
    four_maps.check(c, tasks=tasks)
    four_maps.check(c, tasks=tasks, shared=("weight", "bias"), need=need)


def test_flops():
    assert Conv2d(CASES[0].call(torch.float32)).flops() == 2 * 3 * 5 * 4 * 4 * 2 * 9


def test_what_it_refuses():
    with pytest.raises(Unsupported, match="without batch axis"):
        Conv2d(Call.example(conv2d, torch.randn(2, 5, 5), torch.randn(3, 2, 3, 3)))
    with pytest.raises(Unsupported, match="symmetric"):
        Conv2d(Call.example(same, torch.randn(1, 2, 5, 5), torch.randn(3, 2, 2, 2), None, [1, 1], "same"))

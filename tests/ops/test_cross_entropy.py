"""Softmax cross-entropy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Unsupported
from fastmeta.ops.cross_entropy import CrossEntropy
from fastmeta.ops.generic import GenericOp
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

ce = torch.ops.aten.cross_entropy_loss.default
Z, Y, W = A((6, 4)), A((6,), "classes", 4), A((4,), "positive")


def case(name, z=Z, y=Y, weight=None, reduction=1, ignored=-100, smoothing=0.0):
    return Case(name, ce, (z, y, weight, reduction, ignored, smoothing), fixed=("weight",))


CASES = [
    *(case(f"plain-{r}", reduction=r) for r in (0, 1, 2)),
    *(case(f"smoothed-{r}", reduction=r, smoothing=0.2) for r in (0, 1, 2)),
    *(case(f"weighted-{r}", reduction=r, weight=W) for r in (0, 1, 2)),
    *(case(f"ignored-{r}", reduction=r, ignored=2) for r in (0, 1, 2)),
    *(case(f"everything-{r}", reduction=r, weight=W, ignored=1, smoothing=0.1) for r in (0, 1, 2)),
    *(case(f"images-{r}", A((2, 4, 3, 2)), A((2, 3, 2), "classes", 4), W, r, 1, 0.1) for r in (0, 1, 2)),
    case("one-row", A((1, 4)), A((1,), "classes", 4)),
    case("no-batch", A((4,)), A((), "classes", 4)),
    case("no-batch-unreduced", A((4,)), A((), "classes", 4), W, 0, -100, 0.1),
    case("one-class", A((3, 1)), A((3,), "classes", 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@given(
    rows=st.integers(1, 5),
    classes=st.integers(1, 5),
    positions=st.lists(st.integers(1, 3), max_size=2),
    weighted=st.booleans(),
    reduction=st.integers(0, 2),
    smoothing=st.sampled_from([0.0, 0.3]),
    tasks=st.integers(1, 3),
    layout=st.sampled_from(four_maps.LAYOUTS),
)
def test_drawn_shapes(rows, classes, positions, weighted, reduction, smoothing, tasks, layout):
    z, y = A((rows, classes, *positions)), A((rows, *positions), "classes", classes)
    weight = A((classes,), "positive") if weighted else None
    drawn = case("drawn", z, y, weight, reduction, -100, smoothing)
    four_maps.check(drawn, tasks=tasks, layout=layout)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_ignored_label_may_lie_out_of_range(smoothing):
    ignoring = case("ignored", smoothing=smoothing)
    run = Run(ignoring)
    run.x[1] = torch.tensor([[0, -100, 3, 1, -100, 2]] * 3)
    run.truth = four_maps.Truth(ignoring, run.call, run.x, 3)
    compare(run.maps(), run.expected(), four_maps.FLOAT64_BOUND, "ignored")


def test_large_logits_stay_finite():
    op = CrossEntropy(Call.example(ce, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)))
    z = torch.tensor([[[1e4, 0.0, -1e4]]])
    (loss,), saved = op.forward([z, torch.tensor([[1]])])
    assert loss.item() == 1e4
    assert all(torch.isfinite(s).all() for s in saved)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_is_named(label):
    op = CrossEntropy(CASES[1].call(torch.float32))
    with pytest.raises(ValueError, match=rf"cross_entropy: labels must be in \[0, 4\), got {label}"):
        op.forward([torch.zeros(2, 6, 4), torch.tensor([[0, 1, 2, 3, 0, label]] * 2)])


def test_probabilities_go_to_the_generic_operation():
    soft = Case("soft", ce, (Z, A((6, 4), "unit"), W, 1, -100, 0.1), fixed=("weight",))
    with pytest.raises(Unsupported, match="targets are probabilities"):
        CrossEntropy(soft.call(torch.float32))
    four_maps.check(soft, op=GenericOp)

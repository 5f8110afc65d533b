"""Batch norm: by the set's statistics with and without running ones, and by running statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmeta.core.task_op import Call, Unsupported
from fastmeta.ops.batch_norm import BatchNorm, reference
from fastmeta.ops.generic import GenericOp
from tests.ops import four_maps
from tests.ops.four_maps import A, Case, Run, compare

aten = torch.ops.aten
functional = aten._native_batch_norm_legit_functional.default
no_stats = aten._native_batch_norm_legit.no_stats
evaluation = aten._native_batch_norm_legit_no_training.default


def channels(n: int, kind: str = "normal") -> A:
    return A((n,), kind)


def trained(name: str, shape: tuple[int, ...], momentum: float = 0.1) -> Case:
    n = shape[1]
    arguments = (A(shape), channels(n), channels(n), channels(n), channels(n, "positive"), True, momentum, 1e-5)
    return Case(name, functional, arguments, fixed=("running_mean", "running_var"))


def evaluated(name: str, shape: tuple[int, ...]) -> Case:
    n = shape[1]
    arguments = (A(shape), channels(n), channels(n), channels(n), channels(n, "positive"), 0.1, 1e-5)
    return Case(name, evaluation, arguments, fixed=("running_mean", "running_var"))


CASES = [
    trained("features", (6, 4)),
    trained("images", (3, 2, 5, 3), 0.3),
    trained("sequences", (4, 3, 5)),
    Case("no-stats", no_stats, (A((3, 2, 4, 4)), channels(2), channels(2), True, 0.0, 1e-5)),
    Case("no-affine", no_stats, (A((5, 2)), None, None, True, 0.0, 1e-3)),
    evaluated("evaluation", (3, 2, 4, 4)),
    evaluated("evaluation-features", (5, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_maps(case):
    four_maps.check_all(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_large_sets_go_through_kernels_of_their_own(case, monkeypatch):
    monkeypatch.setattr(reference, "FUSED_ELEMENTS", 0)
    four_maps.check_all(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.target is not functional], ids=str)
def test_agrees_with_the_generic_operation(case):
    compare(Run(case).maps(), Run(case, op=GenericOp).maps(), four_maps.FLOAT64_BOUND, str(case))


@pytest.mark.parametrize("elements", [0, 1 << 17])
def test_a_far_mean_costs_no_more_digits_than_it_does_torch(elements, monkeypatch):
    monkeypatch.setattr(reference, "FUSED_ELEMENTS", elements)
    arguments = (A((5, 2, 4, 4), shift=30.0), channels(2), channels(2), True, 0.0, 1e-5)
    four_maps.check_float32(Case("far", no_stats, arguments))


@given(samples=st.integers(2, 5), n=st.integers(1, 5), sides=st.lists(st.integers(1, 4), max_size=2))
def test_drawn_shapes(samples, n, sides):
    # the bound of four_maps is for well-scaled values; eps keeps two nearly equal samples from being blown up
    arguments = (A((samples, n, *sides)), channels(n), channels(n), True, 0.0, 0.1)
    four_maps.check(Case("drawn", no_stats, arguments))


def test_channels_last_in_memory_stays_so():
    op = BatchNorm(CASES[1].call(torch.float32))
    x = torch.randn(2, 3, 5, 3, 2).movedim(-1, 2)
    y = op.forward([x, *[torch.ones(2, 2)] * 4])[0][0]
    assert y.movedim(2, -1).is_contiguous()


def test_mixed_dtypes_are_refused():
    x, half = torch.randn(3, 2), torch.ones(2).double()
    call = Call.bind(no_stats, (x, half, half, True, 0.1, 1e-5), {}, (x, half, half))
    with pytest.raises(Unsupported, match="one dtype"):
        BatchNorm(call)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_large_set_keeps_its_digits(shift):
    """Statistics of thousands of pixels are summed as well as PyTorch sums an image with its channels first."""
    z = torch.randn(2, 5, 16, 56, 56).relu() + shift
    n = z.shape[2]
    ones, zeros = torch.ones(n), torch.zeros(n)
    op = BatchNorm(Call.example(no_stats, z[0], ones, zeros, True, 0.0, 1e-5))
    last = z.movedim(2, -1).contiguous().movedim(-1, 2)
    got = op.forward([last, ones.expand(2, n), zeros.expand(2, n)])[0][0]
    truth = torch.stack([torch.nn.functional.batch_norm(v.double(), None, None, training=True) for v in z])
    own = torch.stack([torch.nn.functional.batch_norm(v, None, None, training=True) for v in z])
    error, allowed = (got - truth).square().mean().sqrt(), (own - truth).square().mean().sqrt()
    assert error <= 2 * allowed

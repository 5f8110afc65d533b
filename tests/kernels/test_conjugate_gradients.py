"""Conjugate gradients' Triton kernels against the float64 reference, iteration by iteration, and to their end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastmeta.ops import conjugate_gradients as cg
from fastmeta.ops.conjugate_gradients import reference
from fastmeta.ops.conjugate_gradients.state import State
from tests.kernels.running import device, reversed_programs

EPS = torch.finfo(torch.float32).eps
SIZES = [1, 33, 1024, 2500]
SHIFT = 0.5


def on(state: State, where: torch.device | str, dtype: torch.dtype) -> State:
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return State(**{n: t.to(where, dtype if t.is_floating_point() else None, copy=True) for n, t in values.items()})


def systems(size: int) -> tuple[Tensor, Tensor]:
    """Diagonals ``B`` and right-hand sides: two solvable tasks, one of negative curvature, one that has ended."""
    torch.manual_seed(size)
    diagonal = 1 + torch.rand(4, size, dtype=torch.float64)
    diagonal[2] *= -2
    b = torch.randn(4, size, dtype=torch.float64)
    b[3] = 0
    return diagonal, b


@pytest.mark.parametrize("size", SIZES)
def test_an_iteration_is_the_references(size: int, nan_poison: None) -> None:
    there = device()
    from fastmeta.ops.conjugate_gradients import triton

    diagonal, b = systems(size)
    exact = cg.start(b, 1e-3)
    for _ in range(3):
        single = on(exact, "cpu", torch.float32)
        ours, wide = on(single, there, torch.float32), on(single, "cpu", torch.float64)
        product = (diagonal.float() * single.p).to(there)
        with reversed_programs():
            triton.advance(ours, product, SHIFT)
        reference.advance(wide, product.cpu().double(), SHIFT)
        bound = EPS * (16 + 4 * size**0.5)
        for name in ("v", "r", "p", "square"):
            got, want = getattr(ours, name).cpu().double(), getattr(wide, name)
            assert (got - want).norm() <= bound * (want.norm() + single.r.norm()), name
        for name in ("active", "positive", "iterations"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(wide, name)), name
        assert torch.equal(ours.v[3].cpu(), torch.zeros(size))
        reference.advance(exact, diagonal * exact.p, SHIFT)


@pytest.mark.parametrize("size", SIZES)
def test_they_solve_and_keep_what_they_have(size: int, nan_poison: None) -> None:
    there = device()
    from fastmeta.ops.conjugate_gradients import triton

    diagonal, b = systems(size)
    state = cg.start(b.float().to(there), 1e-5)
    few = diagonal.float().to(there)
    for _ in range(20):
        triton.advance(state, few * state.p, SHIFT)
    want = b / (diagonal + SHIFT)
    error = (state.v.cpu().double() - want)[:2].norm(dim=1) / want[:2].norm(dim=1)
    assert (error <= 1e-4).all()  # ten times the residual that ends a task, of condition numbers below two
    assert state.active.tolist() == [False] * 4
    assert state.positive.tolist() == [True, True, False, True]
    assert state.iterations[2:].tolist() == [0, 0]
    assert (state.iterations[:2] < 20).all()
    assert not state.v[2:].any()


def test_nothing_is_done_without_elements() -> None:
    there = device()
    from fastmeta.ops.conjugate_gradients import triton

    for shape in ((0, 3), (2, 0)):
        state = cg.start(torch.zeros(shape, device=there), 1e-3)
        triton.advance(state, torch.zeros(shape, device=there), SHIFT)
        assert not state.iterations.any()


def test_a_cpu_has_no_kernels_for_them() -> None:
    kernels, _ = cg.backends(torch.device("cpu"), torch.float32)
    assert not kernels.available
    assert "not on cpu" in kernels.reason

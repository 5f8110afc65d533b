"""The inner update's Triton kernels against the float64 reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastmeta.ops.inner_update import reference
from tests.kernels.running import device, poisoned, reversed_programs
from tests.ops.test_inner_update import KINDS, make_alpha, make_rows

SIZES = (1, 17, 1025, 2048)
CASES = [
    *itertools.product(KINDS, (3,), SIZES, ("plain",)),
    *itertools.product(("scalar",), (1, 2), (33,), ("shared", "apart")),
]
EPS = torch.finfo(torch.float32).eps


def on_device(x):
    """With its strides, which a copy of an expanded tensor would lose."""
    if x is None or x.device == device():
        return x
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype, device=device())
    storage.copy_(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()))
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize(("kind", "tasks", "size", "layout"), CASES)
def test_step_and_adjoint(kind, tasks, size, layout):
    device()
    from fastmeta.ops.inner_update import triton

    alpha, segments = make_alpha(kind, size, torch.float32)
    theta, g, lam = (make_rows(layout, tasks, size, torch.float32) for _ in range(3))
    there = [on_device(x) for x in (theta, g, alpha, segments)]
    out = poisoned(tasks, size + 2, like=there[0])[:, 1:-1]
    with reversed_programs():
        triton.step(*there, out=out)
        u, d_alpha = triton.adjoint(on_device(lam), *there[1:])
    exact = reference.step(theta.double(), g.double(), alpha.double(), segments)
    # one rounding of the product and one of the difference
    change = reference.scale(g.double(), alpha.double(), segments).abs()
    assert ((out.cpu() - exact).abs() <= EPS * (exact.abs() + change)).all()
    assert torch.equal(u.cpu(), reference.scale(lam, alpha, segments))
    want = reference.adjoint(lam.double(), g.double(), alpha.double(), segments)[1]
    size_of = reference.adjoint(lam.double().abs(), g.double().abs(), alpha.double(), segments)[1].abs()
    # sums of tasks times elements in some order: each addition rounds once, at most
    assert ((d_alpha.cpu() - want).abs() <= EPS * tasks * max(size, 1) * size_of).all()
    assert triton.adjoint(on_device(lam), *there[1:], need_alpha=False)[1] is None


def test_a_step_may_write_over_what_it_reads():
    device()
    from fastmeta.ops.inner_update import triton

    theta, g = torch.randn(2, 5, 70).to(device()).unbind(0)
    want = theta.double() - 0.5 * g.double()
    triton.step(theta, g, torch.full((), 0.5, device=device()), out=theta)
    assert torch.allclose(theta.double(), want, atol=1e-6)


def test_nothing_to_do():
    device()
    from fastmeta.ops.inner_update import triton

    for shape in ((0, 3), (3, 0)):
        x = torch.ones(shape, device=device())
        assert triton.step(x, x, torch.ones(1, device=device())).shape == shape
        u, d_alpha = triton.adjoint(x, x, torch.ones(1, device=device()))
        assert u.shape == shape
        assert d_alpha.item() == 0


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("sizes", [(1,), (5, 1025, 1, 2048), (3,) * 35], ids=str)
def test_steps_of_parts_are_those_of_the_whole(kind, sizes):
    device()
    from fastmeta.ops.inner_update import triton

    tasks, whole = 3, sum(sizes)
    torch.manual_seed(0)
    g, theta = (torch.randn(tasks, whole).to(device()) for _ in range(2))
    parts = [part.contiguous() for part in g.split(sizes, 1)]
    starts = torch.tensor((0, *itertools.accumulate(sizes))).to(device())
    alpha, segments = {
        "scalar": (torch.randn(()), None),
        "one": (torch.randn(1), None),
        "tensor": (torch.randn(len(sizes)), starts),
        "element": (torch.randn(whole), None),
        "none": (None, None),
    }[kind]
    alpha = None if alpha is None else alpha.to(device())
    want = triton.step(theta, g, torch.ones(1, device=device()) if alpha is None else alpha, segments)
    out = poisoned(tasks, whole + 2, like=theta)[:, 1:-1]
    with reversed_programs():
        triton.step_parts(theta.expand(tasks, whole), parts, alpha, segments, out=out)
        shared = triton.step_parts(
            theta[:1].expand(tasks, whole), parts, alpha, segments, out=poisoned(tasks, whole, like=theta)
        )
        triton.step_parts(theta, parts, alpha, segments, out=theta)
    assert torch.equal(out, want)
    assert torch.equal(theta, want)
    assert torch.equal(shared[0], want[0])

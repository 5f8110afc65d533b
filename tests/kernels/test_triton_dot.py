"""Float32 operands in parts: their sums are the operands, and products of parts have float32's accuracy."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.running import device, poisoned

triton = pytest.importorskip("triton")
tl = triton.language

from fastmeta.core.triton_dot import parts, product, thirds  # noqa: E402  # triton may be missing

SIZE = 32


@triton.jit
def split_kernel(X, Halves, Thirds, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(X + at)
    first, second = parts(x)
    tl.store(Halves + at, first)
    tl.store(Halves + SIZE + at, second)
    a, b, c = thirds(x)
    tl.store(Thirds + at, a.to(tl.float32))
    tl.store(Thirds + SIZE + at, b.to(tl.float32))
    tl.store(Thirds + 2 * SIZE + at, c.to(tl.float32))


@triton.jit
def product_kernel(A, B, C, ROUNDS, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(ROUNDS):
        a = tl.load(A + k * SIZE * SIZE + place)
        b = tl.load(B + k * SIZE * SIZE + place)
        total = product(a, b, total, PRECISION)
    tl.store(C + place, total)


def test_parts_add_up_to_the_operand():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(SIZE, generator=generator) * 10.0 ** torch.linspace(-20, 20, SIZE)).to(device())
    x[0] = 0.0
    halves, found = poisoned(2, SIZE, like=x), poisoned(3, SIZE, like=x)
    split_kernel[(1,)](x, halves, found, SIZE=SIZE)
    assert torch.equal(halves.sum(0), x)
    assert torch.equal(halves[0].view(torch.int32) & 8191, torch.zeros_like(x, dtype=torch.int32))  # tf32
    assert torch.equal(found.double().sum(0), x.double())
    assert torch.equal(found.bfloat16().float(), found)


@pytest.mark.parametrize("precision", ["tf32x3", pytest.param("bf16x6", marks=pytest.mark.gpu)])
def test_products_of_parts_have_the_accuracy_of_float32(precision):
    """Over a long sum, which tensor cores would cut off at every step."""
    rounds = 64
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(rounds, SIZE, SIZE, generator=generator).to(device()) for _ in range(2))
    c = poisoned(SIZE, SIZE, like=a)
    product_kernel[(1,)](a, b, c, rounds, SIZE=SIZE, PRECISION=precision)
    truth = torch.einsum("kij,kjl->il", a.cpu().double(), b.cpu().double())
    assert ((c.cpu().double() - truth).norm() / truth.norm()).item() < 5e-7

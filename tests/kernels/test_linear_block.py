"""The fused affine map and activation: its Triton kernels against the float64 reference, that against torch.func."""

from __future__ import annotations

import pytest
import torch

from fastmeta.core.curves import BENT, KINDS, Curve
from fastmeta.ops.linear_block import reference
from tests.kernels.running import device, reversed_programs

SHAPES = [(1, 1, 1, 1), (3, 5, 20, 7), (2, 33, 40, 34)]  # tasks, rows, in, out
EPS = torch.finfo(torch.float32).eps


def operands(tasks, rows, wide, out, *, shared, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lead = () if shared else (tasks,)
    return {
        "x": draw(tasks, rows, wide),
        "weight": draw(*lead, out, wide) / wide**0.5,
        "bias": draw(*lead, out),
        "x_dot": draw(tasks, rows, wide),
        "weight_dot": draw(tasks, out, wide) / wide**0.5,
        "bias_dot": draw(tasks, out),
        "d_y": draw(tasks, rows, out),
        "d_y_dot": draw(tasks, rows, out),
    }


def close(got, want, length):
    """Of a sum of so many products: float32's roundings add like a random walk; the curves add a few."""
    bound = EPS * (4 * length**0.5 + 16)
    want = want.cpu()
    gap = (got.cpu().double() - want).norm() / want.norm().clamp_min(1e-30)
    assert gap <= bound, f"off by {gap:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_derivative(kind):
    curve = Curve(kind, 0.1)
    o = operands(2, 4, 5, 3, shared=False)

    def value(x, weight, bias):
        return reference.forward(x, weight, bias, curve)[0]

    primal, dots = (o["x"], o["weight"], o["bias"]), (o["x_dot"], o["weight_dot"], o["bias_dot"])
    y_dot = torch.func.jvp(value, primal, dots)[1]
    s = reference.forward(*primal, curve)[1]
    got, z_dot = reference.tangent(o["x"], o["weight"], s, *dots, curve)
    assert torch.allclose(got, y_dot, rtol=1e-12, atol=1e-12)

    def gradient(*primal_and_cotangent):
        return torch.func.vjp(value, *primal_and_cotangent[:3])[1](primal_and_cotangent[3])

    want, want_dot = torch.func.jvp(gradient, (*primal, o["d_y"]), (*dots, o["d_y_dot"]))
    back = reference.backward(o["x"], o["weight"], s, o["d_y"], curve)
    tangent = reference.tangent_backward(
        o["x"], o["weight"], s, o["x_dot"], o["weight_dot"], z_dot, o["d_y"], o["d_y_dot"], curve
    )
    for a, b in zip((*back, *tangent), (*want, *want_dot), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_the_reference(shape, kind, shared, nan_poison):
    device()
    from fastmeta.ops.linear_block import triton

    _, rows, wide, out = shape
    curve = Curve(kind, 0.1)
    wide_o = operands(*shape, shared=shared)
    o = {name: value.float().to(device()) for name, value in wide_o.items()}
    wide_o = {name: value.cpu().double() for name, value in o.items()}
    # what derivatives are functions of is given, so that a curve's kink is on the same side for both
    y, s = reference.forward(wide_o["x"], wide_o["weight"], wide_o["bias"], curve)
    by_input = kind in reference.BY_INPUT
    with reversed_programs():
        got, z = triton.rows(curve, o["x"], o["weight"], o["bias"], keep=by_input)
        close(got, y, wide)
        if by_input:
            close(z, s, wide)
        there = s.float().to(device())
        s = there.cpu().double()
        weight = wide_o["weight"]
        y_dot, z_dot = reference.tangent(
            wide_o["x"], weight, s, wide_o["x_dot"], wide_o["weight_dot"], wide_o["bias_dot"], curve
        )
        got, got_z = triton.rows(
            curve, o["x_dot"], o["weight"], o["bias_dot"], o["x"], o["weight_dot"], there, keep=kind in BENT
        )
        close(got, y_dot, 2 * wide)
        if kind in BENT:
            close(got_z, z_dot, 2 * wide)
        d_x, d_w, d_b = reference.backward(wide_o["x"], weight, s, wide_o["d_y"], curve)
        args = curve, there, o["d_y"], o["x"], o["weight"]
        got, got_w, got_b = triton.cotangents(*args, bias=True)
        close(got, d_x, out)
        close(got_w, d_w, rows)
        close(got_b, d_b, rows)
        alone = triton.cotangents(*args, of_weight=False), triton.cotangents(*args, of_x=False, bias=True)
        assert [wanted is None for one in alone for wanted in one] == [False, True, True, True, False, False]
        assert torch.equal(alone[0].x, got)
        assert torch.equal(alone[1].weight, got_w)
        assert torch.equal(alone[1].bias, got_b)
        z32 = z_dot.float().to(device())
        want = reference.tangent_backward(
            wide_o["x"], weight, s, wide_o["x_dot"], wide_o["weight_dot"], z32.cpu().double(), wide_o["d_y"],
            wide_o["d_y_dot"], curve,
        )  # fmt: skip
        dots = o["d_y_dot"], z32, o["x_dot"], o["weight_dot"]
        got, got_w, got_b = triton.cotangents(*args, *dots, tangent=True, bias=True)
        close(got, want[0], 2 * out)
        close(got_w, want[1], 2 * rows)
        close(got_b, want[2], rows)


@pytest.mark.parametrize("kind", ["identity", "tanh"])
def test_what_is_missing_is_zero(kind):
    device()
    from fastmeta.ops.linear_block import triton

    curve = Curve(kind)
    wide_o = operands(2, 5, 20, 18, shared=False)
    o = {name: value.float().to(device()) for name, value in wide_o.items()}
    s = reference.forward(wide_o["x"], wide_o["weight"], wide_o["bias"], curve)[1]
    there, none = s.float().to(device()), torch.zeros_like
    zero_x, zero_w = none(wide_o["x"]), none(wide_o["weight"])
    want, z_dot = reference.tangent(wide_o["x"], wide_o["weight"], s, zero_x, wide_o["weight_dot"], None, curve)
    close(triton.rows(curve, o["x"], o["weight_dot"], s=there)[0], want, 20)
    want, _ = reference.tangent(wide_o["x"], wide_o["weight"], s, wide_o["x_dot"], zero_w, None, curve)
    close(triton.rows(curve, o["x_dot"], o["weight"], s=there)[0], want, 20)
    z32 = z_dot.float().to(device())
    base = [wide_o["x"], wide_o["weight"], s, zero_x, zero_w, z_dot]
    want = reference.tangent_backward(*base, wide_o["d_y"], none(wide_o["d_y"]), curve)
    if kind == "tanh":
        got = triton.cotangents(curve, there, o["d_y"], o["x"], o["weight"], None, z32, tangent=True)
        close(got.x, want[0], 18)
        close(got.weight, want[1], 5)
    want = reference.tangent_backward(*base[:5], none(z_dot), none(wide_o["d_y"]), wide_o["d_y_dot"], curve)
    got = triton.cotangents(curve, there, None, o["x"], o["weight"], o["d_y_dot"], tangent=True)
    close(got.x, want[0], 18)
    close(got.weight, want[1], 5)


def test_the_precision_that_pytorch_is_asked_for():
    device()
    from fastmeta.ops.linear_block import triton

    curve = Curve("identity")
    wide_o = operands(2, 33, 40, 34, shared=False)
    right = reference.forward(wide_o["x"], wide_o["weight"], None, curve)[0]
    x, weight = (wide_o[name].float().to(device()) for name in ("x", "weight"))
    errors = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            y = triton.rows(curve, x, weight, None)[0].cpu().double()
        finally:
            torch.set_float32_matmul_precision("highest")
        errors[precision] = float((y - right).norm() / right.norm())
    assert errors["highest"] <= 1e-6
    assert 1e-4 < errors["medium"] < 2.0**-7  # operands of eight bits, which the interpreter cuts off

"""Products of float32 tiles in Triton, as precisely as was asked for; ``triton_support.build_precision`` says how."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A float32 tile as :func:`product` reads it."""
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    if PRECISION == "bf16 rounded":  # the interpreter, which cannot multiply bfloat16
        x = x.to(tl.bfloat16).to(tl.float32)
    return x


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` of operands, summed in float32."""
    if PRECISION == "bf16" or PRECISION == "bf16 rounded":
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` of float32 tiles, summed in float32."""
    return product(operand(a, PRECISION), operand(b, PRECISION), total, PRECISION)

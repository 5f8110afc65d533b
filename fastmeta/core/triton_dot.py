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
def parts(a):
    """``a`` rounded to tf32's 10 bits of mantissa, and the rest, of either sign: their sum is ``a``."""
    first = ((a.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return first, a - first


@triton.jit
def thirds(a):
    """Three bfloat16 tiles whose sum is ``a``: its 24 bits of mantissa, eight at a time."""
    bits = a.to(tl.int32, bitcast=True)
    rest = a - (bits & -65536).to(tl.float32, bitcast=True)
    rest_bits = rest.to(tl.int32, bitcast=True)
    last = rest - (rest_bits & -65536).to(tl.float32, bitcast=True)
    return _upper(bits), _upper(rest_bits), _upper(last.to(tl.int32, bitcast=True))


@triton.jit
def _upper(bits):
    """The upper half of a float32's bits: a bfloat16."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def alone(a, b, PRECISION: tl.constexpr):
    """``a b`` of operands, the smallest products first."""
    if PRECISION == "bf16" or PRECISION == "bf16 rounded":
        total = tl.dot(a, b)
    elif PRECISION == "tf32x3":
        a1, a2 = parts(a)
        b1, b2 = parts(b)
        total = in_parts(a1, a2, b1, b2)
    elif PRECISION == "bf16x6":
        a1, a2, a3 = thirds(a)
        b1, b2, b3 = thirds(b)
        total = _in_thirds(a1, a2, a3, b1, b2, b3, tl.dot(a1, b3))
    else:
        total = tl.dot(a, b, input_precision=PRECISION)
    return total


@triton.jit
def onto(a, b, total, BEGUN: tl.constexpr, PRECISION: tl.constexpr):
    """``total + a b``, or ``a b`` where the total has not ``BEGUN``, all of it by tensor cores: for a few products."""
    if not BEGUN:
        total = alone(a, b, PRECISION)
    elif PRECISION == "bf16" or PRECISION == "bf16 rounded":
        total = tl.dot(a, b, total)
    elif PRECISION == "tf32x3":
        a1, a2 = parts(a)
        b1, b2 = parts(b)
        total = tl.dot(a2, b1, total, input_precision="tf32")
        total = tl.dot(a1, b2, total, input_precision="tf32")
        total = tl.dot(a1, b1, total, input_precision="tf32")
    elif PRECISION == "bf16x6":
        a1, a2, a3 = thirds(a)
        b1, b2, b3 = thirds(b)
        total = _in_thirds(a1, a2, a3, b1, b2, b3, tl.dot(a1, b3, total))
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` of operands, summed in float32.

    Tensor cores cut sums off and do not round them: over a long loop that is several times float32's own error. So
    where float32's accuracy is wanted they add up one tile alone.
    """
    if PRECISION == "tf32x3" or PRECISION == "bf16x6":
        total += alone(a, b, PRECISION)
    else:
        total = onto(a, b, total, True, PRECISION)
    return total


@triton.jit
def _in_thirds(a1, a2, a3, b1, b2, b3, total):
    """The five larger of the six products of :func:`thirds`, added to the smallest."""
    total = tl.dot(a3, b1, total)
    total = tl.dot(a2, b2, total)
    total = tl.dot(a1, b2, total)
    total = tl.dot(a2, b1, total)
    return tl.dot(a1, b1, total)


@triton.jit
def in_parts(a1, a2, b1, b2):
    """``a b`` of operands in :func:`parts`."""
    part = tl.dot(a2, b1, input_precision="tf32")
    part = tl.dot(a1, b2, part, input_precision="tf32")
    return tl.dot(a1, b1, part, input_precision="tf32")


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """``total + a b`` of float32 tiles, summed in float32."""
    return product(operand(a, PRECISION), operand(b, PRECISION), total, PRECISION)

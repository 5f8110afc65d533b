"""The curves of :mod:`fastmeta.core.curves` in Triton: value, slope and bend of a tile."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    # a series where the quotient would lose what is left of 1 - e
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    q = z * z
    near = tl.abs(z) * (1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835)))))
    size = tl.where(tl.abs(z) < 0.25, near, far)
    return tl.where(z < 0, -size, size)


@triton.jit
def value(z, below, KIND: tl.constexpr):
    """``f(z)``."""
    if KIND == "relu":
        return tl.maximum(z, 0.0)
    elif KIND == "leaky_relu":
        return tl.where(z > 0, z, z * below)
    elif KIND == "tanh":
        return _tanh(z)
    elif KIND == "sigmoid":
        return _sigmoid(z)
    elif KIND == "silu":
        return z * _sigmoid(z)
    elif KIND == "gelu":
        return z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        return z


@triton.jit
def slope(s, below, KIND: tl.constexpr):
    """``f'``."""
    if KIND == "relu":
        return tl.where(s > 0, 1.0, 0.0)
    elif KIND == "leaky_relu":
        return tl.where(s > 0, 1.0, below)
    elif KIND == "tanh":
        return 1.0 - s * s
    elif KIND == "sigmoid":
        return s * (1.0 - s)
    elif KIND == "silu":
        g = _sigmoid(s)
        return g * (1.0 + s * (1.0 - g))
    else:
        return 0.5 * (1.0 + tl.erf(s * 0.7071067811865476)) + s * tl.exp(-0.5 * s * s) * 0.3989422804014327


@triton.jit
def bend(s, KIND: tl.constexpr):
    """``f''``, of those that have one."""
    if KIND == "tanh":
        return -2.0 * s * (1.0 - s * s)
    elif KIND == "sigmoid":
        return s * (1.0 - s) * (1.0 - 2.0 * s)
    elif KIND == "silu":
        g = _sigmoid(s)
        return g * (1.0 - g) * (2.0 + s * (1.0 - 2.0 * g))
    else:
        return tl.exp(-0.5 * s * s) * 0.3989422804014327 * (2.0 - s * s)

"""Kernels of a sum and its activation: every map is one pass over elements; the formulas are reference.py's.

Elements are taken as they lie in memory: all operands of a map must lie alike, and those that do not are copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.curves import BENT, BY_INPUT, Curve
from fastmeta.core.triton_curves import bend, slope, value
from fastmeta.core.triton_support import Shipped

BLOCK = 1024
WARPS = 4


@triton.jit
def forward_kernel(
    A, B, Y, Z,  # of count elements each; Z is written where s is not y
    below,
    count,
    KIND: tl.constexpr,
    SUM: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    z = tl.load(A + place, mask, 0.0)
    if SUM:
        z += tl.load(B + place, mask, 0.0)
    tl.store(Y + place, value(z, below, KIND), mask)
    if KEEP:
        tl.store(Z + place, z, mask)


@triton.jit
def derivative_kernel(
    S,  # what f' and f'' are functions of
    A, B,  # y_dot and d_z are f' times their sum
    ZD, D,  # d_z_dot has f'' times their product beside
    Out, Z,  # Z: the sum
    below,
    count,
    KIND: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BENT: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    z = tl.zeros((BLOCK,), tl.float32)
    if FIRST:
        z = tl.load(A + place, mask, 0.0)
    if SECOND:
        z += tl.load(B + place, mask, 0.0)
    if KEEP:
        tl.store(Z + place, z, mask)
    if KIND != "identity":
        s = tl.load(S + place, mask, 0.0)
        z = z * slope(s, below, KIND)
        if BENT:
            z += bend(s, KIND) * tl.load(ZD + place, mask, 0.0) * tl.load(D + place, mask, 0.0)
    tl.store(Out + place, z, mask)


def forward(curve: Curve, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y`` and ``s``."""
    keep = curve.kind in BY_INPUT and b is not None
    a = _dense(a)
    y = torch.empty_like(a)
    z = torch.empty_like(a) if keep else y
    count = a.numel()
    forward_kernel[(triton.cdiv(count, BLOCK),)](
        a, a if b is None else _as(b, a), y, z, curve.below, count,
        KIND=curve.kind, SUM=b is not None, KEEP=keep, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return y, a if curve.kind in BY_INPUT and not keep else z


def derivative(
    curve: Curve,
    s: Tensor,
    a: Tensor | None,
    b: Tensor | None = None,
    bent: tuple[Tensor, Tensor] | None = None,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``f' (a + b) + f'' z_dot d_y``, and ``a + b`` where that is kept.

    Args:
        curve: ``f``.
        s: what :func:`forward` gave.
        a: a cotangent or a tangent; ``None`` is zero.
        b: another.
        bent: ``z_dot`` and ``d_y``.
        keep: whether the sum is wanted.
    """
    out = torch.empty_like(s)
    total = torch.empty_like(s) if keep else None
    given = [s if x is None else _as(x, s) for x in (a, b, *(bent or (None, None)))]
    count = s.numel()
    derivative_kernel[(triton.cdiv(count, BLOCK),)](
        s, *given, out, out if total is None else total, curve.below, count,
        KIND=curve.kind, FIRST=a is not None, SECOND=b is not None, BENT=bent is not None, KEEP=keep, BLOCK=BLOCK,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out, total


def _dense(x: Tensor) -> Tensor:
    """``x``, whose elements fill a piece of memory in some order; a copy where they do not."""
    like = torch.empty_like(x, device="meta")  # strides that PyTorch gives a result that is to lie as ``x`` does
    return x if _same(x, like.stride()) else torch.empty_like(x).copy_(x)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as ``like`` lies, which is dense."""
    return x if _same(x, like.stride()) else torch.empty_like(like).copy_(x)


def _same(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether the elements of ``x`` lie so; where an axis has one, its stride says nothing."""
    return all(own == other for n, own, other in zip(x.shape, x.stride(), strides, strict=True) if n > 1)


def shipped() -> list[Shipped]:
    """Builds of sums and their maps, for a curve with a bend and one without."""
    builds = []
    for kind in ("relu", "gelu"):
        bent = kind in BENT
        common = {"KIND": kind, "BLOCK": BLOCK}
        second = {"FIRST": True, "SECOND": True, "BENT": False, "KEEP": bent}
        for name, kernel, constants in (
            ("forward", forward_kernel, common | {"SUM": True, "KEEP": kind in BY_INPUT}),
            ("tangent", derivative_kernel, common | second),
            ("tangent backward", derivative_kernel, common | second | {"SECOND": False, "BENT": bent, "KEEP": False}),
        ):
            signature = {n: "constexpr" if n in constants else "*fp32" for n in kernel.arg_names}
            signature |= {"below": "fp32", "count": "i32"}
            builds.append(Shipped(f"sum_block {kind} {name}", kernel, signature, constants, WARPS, 3))
    return builds

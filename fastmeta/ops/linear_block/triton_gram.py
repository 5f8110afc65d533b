"""Kernels of a layer that reads the data alone, whose weight stays a shared matrix and factors (docs/maths.md, eq. 11).

The rows of the data meet nothing but the shared matrix and the factors' rows, which are data too: so an inner step is
one product with few rows for each factor, the bias and the activation, in one launch; and the way back another.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.curves import BENT, BY_INPUT, Curve
from fastmeta.core.triton_curves import slope, value
from fastmeta.core.triton_dot import dot
from fastmeta.core.triton_support import Shipped, build_precision
from fastmeta.ops.linear_block.triton import _cotangents

BLOCK_OUT = 32
BLOCK_RANK = 32
SUMMED_OUT = 32  # columns of a program of cotangents
SUMMED_ROWS = 32  # that it takes at a time
SIZES = ("bias_task", "R", "N", "N2", "O")


class Pair(NamedTuple):
    """``scale * met_t left_t`` of every task.

    Attributes:
        met: products of the data's rows, ``[T, R, r]``.
        left: ``[T, r, out]``.
        scale: a number, or ``[]`` on the device.
    """

    met: Tensor
    left: Tensor
    scale: Tensor | float


@triton.jit
def _add_pair(acc, M, L, Scale, scale, r, o, task, R, N, O, BN: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus one pair's tile."""
    M += task * R * N
    L += task * N * O
    part = tl.zeros(acc.shape, tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        m = tl.load(M + r[:, None] * N + n[None, :], (r < R)[:, None] & (n < N)[None, :], 0.0)
        left = tl.load(L + n[:, None] * O + o[None, :], (n < N)[:, None] & (o < O)[None, :], 0.0)
        part = dot(m, left, part, PRECISION)
    if Scale is not None:
        scale *= tl.load(Scale)
    return acc + scale * part


@triton.jit(do_not_specialize=SIZES)
def gram_kernel(
    Base,  # [T, R, O] or None
    M,  # [T, R, N], or None where there is no pair
    L,  # [T, N, O]
    Scale,  # [] or None
    M2,  # the second pair, likewise
    L2,
    Scale2,
    B,  # [T or 1, O] or None: b, or b_dot
    S,  # [T, R, O]: makes it a tangent; or None
    Y,  # [T, R, O]
    Z,  # [T, R, O] or None: z of a forward, z_dot of a tangent
    bias_task,  # distance between tasks
    R, N, N2, O,
    scale, scale2,
    below,
    KIND: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``f(base + sum of scale * met left + b)``, or with ``S`` ``f'(s) (...)``."""
    task = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    mask = (r < R)[:, None] & (o < O)[None, :]
    place = task * R * O + r[:, None] * O + o[None, :]
    acc = tl.zeros((BR, BO), tl.float32)
    if Base is not None:
        acc += tl.load(Base + place, mask, 0.0)
    if M is not None:
        acc = _add_pair(acc, M, L, Scale, scale, r, o, task, R, N, O, BN, PRECISION)
    if M2 is not None:
        acc = _add_pair(acc, M2, L2, Scale2, scale2, r, o, task, R, N2, O, BN, PRECISION)
    if B is not None:
        acc += tl.load(B + task * bias_task + o, o < O, 0.0)[None, :]
    if Z is not None:
        tl.store(Z + place, acc, mask)
    if S is None:
        acc = value(acc, below, KIND)
    else:
        if KIND != "identity":
            acc = acc * slope(tl.load(S + place, mask, 0.0), below, KIND)
    tl.store(Y + place, acc, mask)


@triton.jit(do_not_specialize=["R", "O"])
def summed_kernel(
    S, D, DD, ZD,  # [T, R, O]: s, d_y, d_y_dot, z_dot; what is not there is not read
    Out,  # [T, R, O]: d_z, or d_z_dot
    Sum,  # [T, O] or None: its sum over rows
    R, O,
    below,
    KIND: tl.constexpr,
    TANGENT: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DD: tl.constexpr,
    HAS_ZD: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
):  # fmt: skip
    """Cotangents of what the activation was applied to, and the bias's."""
    task = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    total = tl.zeros((BO,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        mask = (r < R)[:, None] & (o < O)[None, :]
        place = task * R * O + r[:, None] * O + o[None, :]
        d, dd = _cotangents(S, D, DD, ZD, task, place, mask, below, KIND, HAS_D, HAS_DD, HAS_ZD)
        if TANGENT:
            d = dd
        tl.store(Out + place, d, mask)
        total += tl.sum(d, 0)
    if Sum is not None:
        tl.store(Sum + task * O + o, total, o < O)


def rows(
    curve: Curve,
    base: Tensor | None,  # [T, R, O]
    pairs: tuple[Pair, ...],  # two at the most
    bias: Tensor | None,  # [T, O] or [O]
    s: Tensor | None = None,  # [T, R, O]: makes it a tangent
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``f(base + sum of pairs + b)``, or with ``s`` ``f'(s) (...)``; and, to keep, what stands in brackets."""
    some = base if base is not None else pairs[0].left
    tasks, wide = some.shape[0], some.shape[-1]
    count = base.shape[1] if base is not None else pairs[0].met.shape[1]
    y = some.new_empty(tasks, count, wide)
    z = torch.empty_like(y) if keep else None
    first, second = (*pairs, None, None)[:2]
    bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
    base = base if base is None else base.contiguous()
    block_rows = 16 if count <= 16 else 32
    grid = (triton.cdiv(wide, BLOCK_OUT), triton.cdiv(count, block_rows), tasks)
    gram_kernel[grid](
        base, *_operands(first), *_operands(second), bias, None if s is None else s.contiguous(), y, z,
        bias.stride(0) if bias is not None and bias.dim() == 2 else 0,
        count, _rank(first), _rank(second), wide, _number(first), _number(second), curve.below,
        KIND=curve.kind, BR=block_rows, BO=BLOCK_OUT, BN=BLOCK_RANK, PRECISION=build_precision(),
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y, z


def summed(
    curve: Curve,
    s: Tensor,  # [T, R, O]
    d: Tensor | None,  # [T, R, O]: d_y
    d_dot: Tensor | None = None,  # [T, R, O]: d_y_dot
    z_dot: Tensor | None = None,  # [T, R, O]
    *,
    tangent: bool = False,
    bias: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``d_z``, or for a tangent ``d_z_dot``, ``[T, R, O]``; and its sum over rows, ``[T, O]``, where it is wanted."""
    tasks, count, wide = s.shape
    out = torch.empty_like(s, memory_format=torch.contiguous_format)
    total = s.new_empty(tasks, wide) if bias else None
    bent = z_dot is not None and d is not None and curve.kind in BENT
    given = [s if x is None else x.contiguous() for x in (s, d, d_dot, z_dot)]  # any pointer where none is read
    summed_kernel[(triton.cdiv(wide, SUMMED_OUT), tasks)](
        *given, out, total, count, wide, curve.below, KIND=curve.kind, TANGENT=tangent, HAS_D=d is not None,
        HAS_DD=d_dot is not None, HAS_ZD=bent, BR=SUMMED_ROWS, BO=SUMMED_OUT,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out, total


def _operands(pair: Pair | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if pair is None:
        return None, None, None
    scale = pair.scale if isinstance(pair.scale, Tensor) else None
    return pair.met.contiguous(), pair.left.contiguous(), scale


def _rank(pair: Pair | None) -> int:
    return 0 if pair is None else pair.met.shape[2]


def _number(pair: Pair | None) -> float:
    return 1.0 if pair is None or isinstance(pair.scale, Tensor) else pair.scale


def shipped() -> list[Shipped]:
    """Builds of both kernels for two curves: forward with one factor, tangent with two."""
    builds = []
    for kind in ("relu", "gelu"):
        for tangent in (False, True):
            name = f"gram_block {kind} {'tangent' if tangent else 'primal'}"
            bent = tangent and kind in BENT
            kept = bent or (kind in BY_INPUT and not tangent)
            missing = ["Base"] if tangent else ["M2", "L2", "Scale2", "S"]
            missing += [] if kept else ["Z"]
            tile: dict[str, Any] = {"KIND": kind, "BR": 32, "BO": BLOCK_OUT, "BN": BLOCK_RANK, "PRECISION": "tf32x3"}
            flags: dict[str, Any] = {
                "KIND": kind,
                "TANGENT": tangent,
                "HAS_D": not tangent or bent,
                "HAS_DD": tangent,
                "HAS_ZD": bent,
            }
            flags |= {"BR": SUMMED_ROWS, "BO": SUMMED_OUT}
            builds += [_build(f"{name} rows", gram_kernel, tile, missing, tensor_cores=True)]
            builds += [_build(f"{name} cotangents", summed_kernel, flags, [])]
    return builds


def _build(
    name: str, kernel: Any, constants: Mapping[str, Any], missing: list[str], *, tensor_cores: bool = False
) -> Shipped:
    """A build whose arguments ``missing`` are ``None``."""
    signature = {}
    for argument in kernel.arg_names:
        kind = "*fp32" if argument[0].isupper() and argument not in SIZES else "i32"
        if argument in constants or argument in missing:
            kind = "constexpr"
        elif argument in ("scale", "scale2", "below"):
            kind = "fp32"
        signature[argument] = kind
    return Shipped(name, kernel, signature, {**constants, **dict.fromkeys(missing)}, 4, 1, tensor_cores)

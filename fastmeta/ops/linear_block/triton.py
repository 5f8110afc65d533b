"""Kernels of an affine map and its activation, task-batched; the formulas are reference.py's.

A program computes a tile of one task's result. Weights may lie any distance apart from task to task, zero where tasks
share them. Where a map has two products, both are added up in the same registers, and operands are loaded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.curves import BENT, BY_INPUT, Curve
from fastmeta.core.triton_curves import bend, slope, value
from fastmeta.core.triton_dot import dot
from fastmeta.core.triton_support import Shipped, build_precision

BLOCK_IN = 32  # of the contraction over a layer's inputs or outputs
BLOCK_TWO = 16  # of any contraction, with two products: more does not fit the registers
STAGES = 3
LOSS = Curve(
    "loss"
)  # of cotangents: of a loss by its gradient g, where d_z = d_l g and d_z_dot = d_l_dot g + d_l g_dot
TWICE = (*BENT, LOSS.kind)  # with a second derivative


@triton.jit
def _cotangents(
    S, D, DD, ZD, task, place, mask, below, KIND: tl.constexpr, HAS_D: tl.constexpr, HAS_DD: tl.constexpr,
    HAS_ZD: tl.constexpr,
):  # fmt: skip
    """Tiles of ``d_z`` (zero without ``HAS_D``) and ``d_z_dot``."""
    d = tl.zeros(place.shape, tl.float32)
    dd = tl.zeros(place.shape, tl.float32)
    if KIND == "loss":
        g = tl.load(S + place, mask, 0.0)
        if HAS_D:
            d = tl.load(D + task) * g
        if HAS_DD:
            dd = tl.load(DD + task) * g
        if HAS_ZD:
            dd += tl.load(D + task) * tl.load(ZD + place, mask, 0.0)
        return d, dd
    if HAS_D:
        d = tl.load(D + place, mask, 0.0)
    if HAS_DD:
        dd = tl.load(DD + place, mask, 0.0)
    if KIND != "identity":
        s = tl.load(S + place, mask, 0.0)
        steep = slope(s, below, KIND)
        dd = dd * steep
        if HAS_ZD:
            dd += bend(s, KIND) * tl.load(ZD + place, mask, 0.0) * d
        d = d * steep
    return d, dd


@triton.jit
def affine(
    A, V, A2, V2, task, r, o, v_task, v2_task, R, I, O, FIRST: tl.constexpr, SECOND: tl.constexpr, BR: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of ``A V^T + A2 V2^T``, or of one of them."""
    i = tl.arange(0, BI)
    A += task * R * I
    A2 += task * R * I
    V += task * v_task
    V2 += task * v2_task
    acc = tl.zeros((BR, BO), tl.float32)
    for start in range(0, I, BI):
        at = start + i
        x_place, x_mask = r[:, None] * I + at[None, :], (r < R)[:, None] & (at < I)[None, :]
        w_place, w_mask = o[None, :] * I + at[:, None], (o < O)[None, :] & (at < I)[:, None]
        if FIRST:
            acc = dot(tl.load(A + x_place, x_mask, 0.0), tl.load(V + w_place, w_mask, 0.0), acc, PRECISION)
        if SECOND:
            acc = dot(tl.load(A2 + x_place, x_mask, 0.0), tl.load(V2 + w_place, w_mask, 0.0), acc, PRECISION)
    return acc


@triton.jit
def rows_kernel(
    A,  # [T, R, I]: x, or x_dot
    V,  # [T, O, I]: W
    A2,  # [T, R, I]: x, with a second product
    V2,  # [T, O, I]: W_dot
    B,  # [T, O]: b, or b_dot
    S,  # [T, R, O], read by a tangent
    Y,  # [T, R, O]
    Z,  # [T, R, O]: s of a forward where it is not y, z_dot of a tangent
    v_task, v2_task, b_task,  # distances between tasks
    R, I, O,
    below,
    KIND: tl.constexpr,
    TANGENT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    acc = affine(A, V, A2, V2, task, r, o, v_task, v2_task, R, I, O, FIRST, SECOND, BR, BO, BI, PRECISION)
    if BIAS:
        acc += tl.load(B + task * b_task + o, o < O, 0.0)[None, :]
    mask = (r < R)[:, None] & (o < O)[None, :]
    place = task * R * O + r[:, None] * O + o[None, :]
    if KEEP:
        tl.store(Z + place, acc, mask)
    if TANGENT:
        if KIND != "identity":
            acc = acc * slope(tl.load(S + place, mask, 0.0), below, KIND)
    else:
        acc = value(acc, below, KIND)
    tl.store(Y + place, acc, mask)


@triton.jit
def _columns(
    S, D, DD, ZD, V, V2, X, v_task, v2_task, task, place, R, I, O, below, KIND: tl.constexpr, TANGENT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DD: tl.constexpr, HAS_ZD: tl.constexpr, SECOND: tl.constexpr, BR: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``d_x`` or ``d_x_dot``."""
    across = tl.cdiv(I, BI)
    r = place // across * BR + tl.arange(0, BR)
    i = place % across * BI + tl.arange(0, BI)
    V += task * v_task
    V2 += task * v2_task
    acc = tl.zeros((BR, BI), tl.float32)
    for start in range(0, O, BO):
        o = start + tl.arange(0, BO)
        d_mask = (r < R)[:, None] & (o < O)[None, :]
        d_place = task * R * O + r[:, None] * O + o[None, :]
        d, dd = _cotangents(S, D, DD, ZD, task, d_place, d_mask, below, KIND, HAS_D, HAS_DD, HAS_ZD)
        w_place, w_mask = o[:, None] * I + i[None, :], (o < O)[:, None] & (i < I)[None, :]
        if TANGENT:
            if HAS_DD or HAS_ZD:
                acc = dot(dd, tl.load(V + w_place, w_mask, 0.0), acc, PRECISION)
            if SECOND:
                acc = dot(d, tl.load(V2 + w_place, w_mask, 0.0), acc, PRECISION)
        else:
            acc = dot(d, tl.load(V + w_place, w_mask, 0.0), acc, PRECISION)
    tl.store(X + task * R * I + r[:, None] * I + i[None, :], acc, (r < R)[:, None] & (i < I)[None, :])


@triton.jit
def _weights(
    S, D, DD, ZD, A, A2, W, B, task, place, R, I, O, below, KIND: tl.constexpr, TANGENT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_DD: tl.constexpr, HAS_ZD: tl.constexpr, SECOND: tl.constexpr, BIAS: tl.constexpr,
    BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``d_W`` or ``d_W_dot``, and by the first of a row of tiles the bias's."""
    across = tl.cdiv(I, BI)
    o = place // across * BO + tl.arange(0, BO)
    i = place % across * BI + tl.arange(0, BI)
    A += task * R * I
    A2 += task * R * I
    acc = tl.zeros((BO, BI), tl.float32)
    total = tl.zeros((BO,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        d_mask = (o < O)[:, None] & (r < R)[None, :]
        d_place = task * R * O + r[None, :] * O + o[:, None]
        d, dd = _cotangents(S, D, DD, ZD, task, d_place, d_mask, below, KIND, HAS_D, HAS_DD, HAS_ZD)
        x_place, x_mask = r[:, None] * I + i[None, :], (r < R)[:, None] & (i < I)[None, :]
        if TANGENT:
            if HAS_DD or HAS_ZD:
                acc = dot(dd, tl.load(A + x_place, x_mask, 0.0), acc, PRECISION)
            if SECOND:
                acc = dot(d, tl.load(A2 + x_place, x_mask, 0.0), acc, PRECISION)
            total += tl.sum(dd, 1)
        else:
            acc = dot(d, tl.load(A + x_place, x_mask, 0.0), acc, PRECISION)
            total += tl.sum(d, 1)
    tl.store(W + task * O * I + o[:, None] * I + i[None, :], acc, (o < O)[:, None] & (i < I)[None, :])
    if BIAS:
        if place % across == 0:
            tl.store(B + task * O + o, total, o < O)


@triton.jit
def cotangents_kernel(
    S, D, DD, ZD,  # [T, R, O]: s, d_y, d_y_dot, z_dot; for a loss g, d_l [T], d_l_dot [T], g_dot
    V,  # [T, O, I]: W
    V2,  # [T, O, I]: W_dot
    A,  # [T, R, I]: x
    A2,  # [T, R, I]: x_dot
    X,  # [T, R, I]: d_x, or d_x_dot
    W,  # [T, O, I]: d_W, or d_W_dot
    B,  # [T, O]: d_b, or d_b_dot
    v_task, v2_task,
    R, I, O,
    below,
    KIND: tl.constexpr,
    TANGENT: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_DD: tl.constexpr,
    HAS_ZD: tl.constexpr,
    OF_X: tl.constexpr,
    OF_W: tl.constexpr,
    SECOND_X: tl.constexpr,
    SECOND_W: tl.constexpr,
    BIAS: tl.constexpr,
    XR: tl.constexpr, XI: tl.constexpr, XO: tl.constexpr,
    WO: tl.constexpr, WI: tl.constexpr, WR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs of the weight's cotangent and then of the input's: one launch, and neither waits for the other."""
    place = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    of_weights = 0
    if OF_W:
        of_weights = tl.cdiv(O, WO) * tl.cdiv(I, WI)
        if place < of_weights:
            _weights(
                S, D, DD, ZD, A, A2, W, B, task, place, R, I, O, below, KIND, TANGENT, HAS_D, HAS_DD, HAS_ZD,
                SECOND_W, BIAS, WO, WI, WR, PRECISION,
            )  # fmt: skip
    if OF_X:
        if place >= of_weights:
            _columns(
                S, D, DD, ZD, V, V2, X, v_task, v2_task, task, place - of_weights, R, I, O, below, KIND, TANGENT,
                HAS_D, HAS_DD, HAS_ZD, SECOND_X, XR, XI, XO, PRECISION,
            )  # fmt: skip


def rows(
    curve: Curve,
    x: Tensor | None,  # [T, R, I]
    weight: Tensor | None,  # [T, O, I] or [O, I]
    bias: Tensor | None = None,  # [T, O] or [O]
    x2: Tensor | None = None,  # [T, R, I]
    weight2: Tensor | None = None,  # [T, O, I]
    s: Tensor | None = None,  # [T, R, O]: makes it a tangent
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``f(x W^T + x2 W2^T + b)``, or with ``s`` ``f'(s) (...)``; and, to keep, what stands in brackets."""
    some = _some(x, x2)
    tasks, count, wide = some.shape
    out = _some(weight, weight2).shape[-2]
    y = some.new_empty(tasks, count, out)
    z = torch.empty_like(y) if keep else None
    a, a2 = _rows(x, some), _rows(x2, some)
    (v, v_task), (v2, v2_task), (b, b_task) = matrix(weight, some), matrix(weight2, some), vector(bias, some)
    block_rows, block_out = _block(count), _block(out)
    grid = (triton.cdiv(out, block_out), triton.cdiv(count, block_rows), tasks)
    rows_kernel[grid](
        a, v, a2, v2, b, y if s is None else s.contiguous(), y, y if z is None else z, v_task, v2_task, b_task,
        count, wide, out, curve.below, KIND=curve.kind, TANGENT=s is not None,
        FIRST=x is not None and weight is not None, SECOND=x2 is not None and weight2 is not None,
        BIAS=bias is not None, KEEP=keep, BR=block_rows, BO=block_out,
        BI=BLOCK_IN if x2 is None else BLOCK_TWO, PRECISION=build_precision(),
        num_warps=4, num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return y, z


class Cotangents(NamedTuple):
    """Of the input ``[T, R, I]``, the weight ``[T, O, I]`` and the bias ``[T, O]``; ``None`` where not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def cotangents(
    curve: Curve,
    s: Tensor,  # [T, R, O]; of LOSS, g
    d: Tensor | None,  # [T, R, O]: d_y; d_l [T]
    x: Tensor,  # [T, R, I]
    weight: Tensor,  # [T, O, I] or [O, I]
    d_dot: Tensor | None = None,  # [T, R, O]: d_y_dot; d_l_dot [T]
    z_dot: Tensor | None = None,  # [T, R, O]; g_dot
    x_dot: Tensor | None = None,  # [T, R, I]
    weight_dot: Tensor | None = None,  # [T, O, I]
    *,
    tangent: bool = False,
    of_x: bool = True,
    of_weight: bool = True,
    bias: bool = False,
) -> Cotangents:
    """The cotangents, or for a tangent theirs, that are wanted; the bias's comes with the weight's."""
    tasks, count, out = s.shape
    wide = weight.shape[-1]
    d_x = s.new_empty(tasks, count, wide) if of_x else None
    d_w = s.new_empty(tasks, out, wide) if of_weight else None
    d_b = s.new_empty(tasks, out) if of_weight and bias else None
    (v, v_task), (v2, v2_task) = matrix(weight, s), matrix(weight_dot, s)
    tiles = _tiles(count, wide, out, tangent=tangent)
    programs = triton.cdiv(out, tiles["WO"]) * triton.cdiv(wide, tiles["WI"]) if of_weight else 0
    programs += triton.cdiv(count, tiles["XR"]) * triton.cdiv(wide, tiles["XI"]) if of_x else 0
    cotangents_kernel[(programs, tasks)](
        *_each(s, s, d, d_dot, z_dot), v, v2, _rows(x, s), _rows(x_dot, s), *_each(s, d_x, d_w, d_b),
        v_task, v2_task, count, wide, out, curve.below, **_flags(curve, d, d_dot, z_dot, tangent), OF_X=of_x,
        OF_W=of_weight, SECOND_X=weight_dot is not None and d is not None, SECOND_W=x_dot is not None and d is not None,
        BIAS=d_b is not None, **tiles, PRECISION=build_precision(), num_warps=4,
        num_stages=_stages(curve.kind, tangent), enable_fp_fusion=True,
    )  # fmt: skip
    return Cotangents(d_x, d_w, d_b)


def _stages(kind: str, tangent: bool) -> int:
    """Of loads in the loops of cotangents: where a curve bends, tiles of four operands leave registers for one."""
    return 1 if tangent and kind in TWICE else STAGES


def _tiles(count: int, wide: int, out: int, *, tangent: bool) -> dict[str, int]:
    """Of the input's cotangent and of the weight's: rows, and columns or outputs."""
    of_x = {"XR": _block(count), "XI": _block(wide), "XO": BLOCK_TWO if tangent else BLOCK_IN}
    broad = 64 if wide >= 64 and not tangent else _block(wide)
    return of_x | {"WO": _block(out), "WI": broad, "WR": BLOCK_TWO if tangent else _block(count)}


def _flags(curve: Curve, d: Tensor | None, d_dot: Tensor | None, z_dot: Tensor | None, tangent: bool) -> dict[str, Any]:
    bent = z_dot is not None and d is not None and curve.kind in TWICE
    return {
        "KIND": curve.kind,
        "TANGENT": tangent,
        "HAS_D": d is not None,
        "HAS_DD": d_dot is not None,
        "HAS_ZD": bent,
    }


def _block(size: int) -> int:
    return 16 if size <= 16 else 32


def _some(*tensors: Tensor | None) -> Tensor:
    for tensor in tensors:
        if tensor is not None:
            return tensor
    raise RuntimeError("linear_block: one operand of a map must be given, got none")


def _rows(x: Tensor | None, like: Tensor) -> Tensor:
    return like if x is None else x.contiguous()


def _each(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous operands, with any pointer in the place of one that no kernel will read."""
    return [like if tensor is None else tensor.contiguous() for tensor in tensors]


def matrix(weight: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """A weight whose rows follow each other, and the distance between tasks."""
    if weight is None:
        return like, 0
    if weight.stride(-1) != 1 or weight.stride(-2) != weight.shape[-1]:
        weight = weight.contiguous()
    return weight, weight.stride(0) if weight.dim() == 3 else 0


def vector(bias: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    if bias is None:
        return like, 0
    if bias.stride(-1) != 1:
        bias = bias.contiguous()
    return bias, bias.stride(0) if bias.dim() == 2 else 0


def shipped() -> list[Shipped]:
    """Builds of both kernels: the usual tiles of hidden layers, forward and tangent, for two curves; and for a loss."""
    builds = []
    pointer, number = "*fp32", "i32"
    for kind in ("relu", "gelu", LOSS.kind):
        for tangent in (False, True):
            name = f"linear_block {kind} {'tangent' if tangent else 'primal'}"
            common = {"KIND": kind, "TANGENT": tangent, "PRECISION": "tf32x3"}
            bent = tangent and kind in TWICE
            rows_constants = common | {
                "FIRST": True, "SECOND": tangent, "BIAS": True, "KEEP": bent or (kind in BY_INPUT and not tangent),
                "BR": 32, "BO": 32, "BI": BLOCK_TWO if tangent else BLOCK_IN,
            }  # fmt: skip
            both_constants = common | _tiles(32, 256, 256, tangent=tangent) | {
                "HAS_D": True, "HAS_DD": tangent, "HAS_ZD": bent, "OF_X": True, "OF_W": True, "SECOND_X": tangent,
                "SECOND_W": tangent, "BIAS": True,
            }  # fmt: skip
            for part, kernel, constants, stages in (
                ("rows", rows_kernel, rows_constants, STAGES),
                ("cotangents", cotangents_kernel, both_constants, _stages(kind, tangent)),
            ):
                if kind == LOSS.kind and kernel is rows_kernel:  # which triton_head.py has
                    continue
                signature = {n: "constexpr" if n in constants else pointer for n in kernel.arg_names}
                signature |= {n: number for n in ("v_task", "v2_task", "b_task", "R", "I", "O") if n in signature}
                signature["below"] = "fp32"
                builds.append(Shipped(f"{name} {part}", kernel, signature, constants, 4, stages, tensor_cores=True))
    return builds

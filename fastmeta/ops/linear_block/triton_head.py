"""Kernels of a network's last linear layer with the loss of its results: one program a task, and one launch a map.

With ``z = x W^T + b``, the loss's gradient ``g = dl/dz`` and its second derivative ``M``:

    forward           l,  z,  g
    tangent           l_dot = sum g . z_dot,  z_dot,  g_dot = M z_dot
    backward          the cotangents of an affine map (triton.py) with d_z = d_l g
    tangent_backward  likewise with d_z_dot = d_l_dot g + d_l g_dot

of cross-entropy, ``g = f (p - q)`` and ``M z_dot = f p (z_dot - p . z_dot)``, where ``q`` has the label and its
smoothing, and ``f`` is 0 for a row that does not count, else 1 or the reciprocal of their number; and of the squared
error, ``g = 2 f (z - y)`` and ``M z_dot = 2 f z_dot``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_losses import cross_entropy, cross_entropy_dot, rows_that_count
from fastmeta.core.triton_support import Shipped, build_precision
from fastmeta.ops.linear_block.triton import BLOCK_IN, BLOCK_TWO, STAGES, affine, matrix, vector

ELEMENTS = 2048  # of a tile of results, which a program keeps several of in registers
OF_FOUR = 1024  # beyond which four warps spill


class Loss(NamedTuple):
    """Which loss: ``"cross_entropy"`` or ``"mse"``, the mean of its rows or numbers or their sum; a label's rules."""

    kind: str
    mean: bool
    ignored: int = -100
    smoothing: float = 0.0


class Kept(NamedTuple):
    """What the other maps need: ``g`` ``[T, R, C]``, and of cross-entropy ``p`` ``[T, R, C]`` and ``f`` ``[T, R]``."""

    g: Tensor
    p: Tensor | None
    f: Tensor | None


@triton.jit
def head_forward_kernel(
    A,  # [T, R, I]: x
    V,  # [T, C, I]: W
    B,  # [T, C]: b
    target,  # [T, R] of 64 bits: labels; or [T, R, C]: y
    loss,  # [T]
    Z, G, P,  # [T, R, C]
    F,  # [T, R]
    v_task, b_task,  # distances between tasks
    R, I, C,
    ignored, smoothing,
    scale,  # of the squared error: f
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    BIAS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    of_row = scale
    if KIND == "cross_entropy":
        of_row = 1.0
        if MEAN:
            of_row = 1.0 / rows_that_count(target + task * R, R, ignored, BR)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        z = affine(A, V, A, V, task, r, c, v_task, v_task, R, I, C, True, False, BR, BC, BI, PRECISION)
        if BIAS:
            z += tl.load(B + task * b_task + c, c < C, 0.0)[None, :]
        mask = (r < R)[:, None] & (c < C)[None, :]
        place = (task * R + r[:, None]) * C + c[None, :]
        tl.store(Z + place, z, mask)
        if KIND == "cross_entropy":
            y = tl.load(target + task * R + r, r < R, 0)
            counted = (r < R) & (y != ignored)
            row, p, q = cross_entropy(tl.where(mask, z, 0.0), y, c, C, smoothing)
            f = tl.where(counted, of_row, 0.0)
            total += tl.where(counted, row, 0.0)
            tl.store(G + place, f[:, None] * (p - q), mask)
            tl.store(P + place, p, mask)
            tl.store(F + task * R + r, f, r < R)
        else:
            e = tl.where(mask, z - tl.load(target + place, mask, 0.0), 0.0)
            total += tl.sum(e * e, 1)
            tl.store(G + place, 2 * of_row * e, mask)
    tl.store(loss + task, tl.sum(total, 0) * of_row)


@triton.jit
def head_tangent_kernel(
    A,  # [T, R, I]: x_dot
    V,  # [T, C, I]: W
    A2,  # [T, R, I]: x
    V2,  # [T, C, I]: W_dot
    B,  # [T, C]: b_dot
    G, P,  # [T, R, C]
    F,  # [T, R]
    loss_dot,  # [T]
    ZD, GD,  # [T, R, C]
    v_task, v2_task, b_task,
    R, I, C,
    scale,
    KIND: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BIAS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        z_dot = tl.zeros((BR, BC), tl.float32)
        if FIRST or SECOND:
            z_dot = affine(A, V, A2, V2, task, r, c, v_task, v2_task, R, I, C, FIRST, SECOND, BR, BC, BI, PRECISION)
        if BIAS:
            z_dot += tl.load(B + task * b_task + c, c < C, 0.0)[None, :]
        mask = (r < R)[:, None] & (c < C)[None, :]
        place = (task * R + r[:, None]) * C + c[None, :]
        z_dot = tl.where(mask, z_dot, 0.0)
        tl.store(ZD + place, z_dot, mask)
        total += tl.sum(tl.load(G + place, mask, 0.0) * z_dot, 1)
        if KIND == "cross_entropy":
            f = tl.load(F + task * R + r, r < R, 0.0)
            tl.store(GD + place, cross_entropy_dot(z_dot, tl.load(P + place, mask, 0.0), f), mask)
        else:
            tl.store(GD + place, 2 * scale * z_dot, mask)
    tl.store(loss_dot + task, tl.sum(total, 0))


def forward(
    of: Loss,
    x: Tensor,  # [T, R, I]
    weight: Tensor,  # [T, C, I] or [C, I]
    bias: Tensor | None,  # [T, C] or [C]
    target: Tensor,  # [T, R] labels, or [T, R, C]
) -> tuple[Tensor, Tensor, Kept]:
    """Loss ``[T]``, ``z`` ``[T, R, C]`` and what is kept."""
    tasks, rows, wide = x.shape
    classes = weight.shape[-2]
    z = x.new_empty(tasks, rows, classes)
    labels = of.kind == "cross_entropy"
    kept = Kept(
        torch.empty_like(z), torch.empty_like(z) if labels else None, z.new_empty(tasks, rows) if labels else None
    )
    loss = z.new_empty(tasks)
    (v, v_task), (b, b_task) = matrix(weight, x), vector(bias, x)
    head_forward_kernel[(tasks,)](
        x.contiguous(), v, b, target.contiguous(), loss, z, kept.g, _or(kept.p, z), _or(kept.f, z), v_task, b_task,
        rows, wide, classes, of.ignored, of.smoothing, _scale(of, z), KIND=of.kind, MEAN=of.mean, BIAS=bias is not None,
        **_blocks(rows, classes), BI=BLOCK_IN, PRECISION=build_precision(), num_warps=_warps(rows, classes),
        num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, z, kept


def tangent(
    of: Loss,
    kept: Kept,
    x: Tensor,  # [T, R, I]
    weight: Tensor,  # [T, C, I] or [C, I]
    x_dot: Tensor | None,  # [T, R, I]
    weight_dot: Tensor | None,  # [T, C, I]
    bias_dot: Tensor | None,  # [T, C]
) -> tuple[Tensor, Tensor, Tensor]:
    """``l_dot`` ``[T]``, ``z_dot`` and ``g_dot`` ``[T, R, C]``."""
    tasks, rows, classes = kept.g.shape
    z_dot, g_dot, loss_dot = torch.empty_like(kept.g), torch.empty_like(kept.g), x.new_empty(tasks)
    (v, v_task), (v2, v2_task), (b, b_task) = matrix(weight, x), matrix(weight_dot, x), vector(bias_dot, x)
    both = x_dot is not None and weight_dot is not None
    head_tangent_kernel[(tasks,)](
        _or(x_dot, x).contiguous(), v, x.contiguous(), v2, b, kept.g, _or(kept.p, x), _or(kept.f, x), loss_dot, z_dot,
        g_dot, v_task, v2_task, b_task, rows, x.shape[-1], classes, _scale(of, kept.g), KIND=of.kind,
        FIRST=x_dot is not None, SECOND=weight_dot is not None, BIAS=bias_dot is not None, **_blocks(rows, classes),
        BI=BLOCK_TWO if both else BLOCK_IN, PRECISION=build_precision(), num_warps=_warps(rows, classes),
        num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return loss_dot, z_dot, g_dot


def _or(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Any pointer in the place of one that no kernel will read or write."""
    return like if tensor is None else tensor


def _scale(of: Loss, z: Tensor) -> float:
    """The squared error's ``f``."""
    return 1.0 / max(1, z[0].numel()) if of.mean else 1.0


def _blocks(rows: int, classes: int) -> dict[str, int]:
    wide = max(16, triton.next_power_of_2(classes))
    return {"BR": max(16, min(triton.next_power_of_2(rows), ELEMENTS // wide)), "BC": wide}


def _warps(rows: int, classes: int) -> int:
    blocks = _blocks(rows, classes)
    return 4 if blocks["BR"] * blocks["BC"] <= OF_FOUR else 8


def shipped() -> list[Shipped]:
    """Builds for 5 and 20 ways, and for a regression."""
    builds = []
    pointers = {"target": "*i64", "loss": "*fp32", "loss_dot": "*fp32"}
    pointers |= dict.fromkeys(("A", "V", "A2", "V2", "B", "Z", "G", "P", "F", "ZD", "GD"), "*fp32")
    numbers = dict.fromkeys(("v_task", "v2_task", "b_task", "R", "I", "C", "ignored"), "i32")
    numbers |= dict.fromkeys(("smoothing", "scale"), "fp32")
    for kind, rows, classes in (
        ("cross_entropy", 25, 5), ("cross_entropy", 75, 5), ("cross_entropy", 100, 20), ("cross_entropy", 64, 64),
        ("mse", 10, 1),
    ):  # fmt: skip
        common = {"KIND": kind, "MEAN": True, "BIAS": True, "FIRST": True, "SECOND": True, "PRECISION": "tf32x3"}
        types = pointers | numbers | ({} if kind == "cross_entropy" else {"target": "*fp32"})
        for part, kernel, step in (
            ("forward", head_forward_kernel, BLOCK_IN),
            ("tangent", head_tangent_kernel, BLOCK_TWO),
        ):
            constants = {**common, **_blocks(rows, classes), "BI": step}
            constants = {name: constants[name] for name in kernel.arg_names if name in constants}
            signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
            label = f"head_block {kind} {part}, {rows} rows of {classes}"
            warps = _warps(rows, classes)
            builds.append(Shipped(label, kernel, signature, constants, warps, STAGES, tensor_cores=True))
    return builds

"""Softmax cross-entropy on a GPU: a task's rows in one program, loss, gradient and probabilities in one pass.

The formulas are reference.py's, without class weights, where a row's ``r`` is its mask ``m``. A label out of range
makes the task's loss NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_losses import cross_entropy, cross_entropy_dot, rows_that_count
from fastmeta.core.triton_support import Shipped
from fastmeta.ops.cross_entropy.reference import MEAN, Kept

ELEMENTS = 2048  # of a block of rows
WARPS = 4


@triton.jit
def forward_kernel(
    z, labels, loss, g, p, factors,  # [T, R, C], [T, R], [T], [T, R, C], [T, R, C], [T, R]
    R, C, ignored, smoothing,
    MEAN: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    scale = 1.0
    if MEAN:
        scale = 1.0 / rows_that_count(labels + task * R, R, ignored, BR)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        y = tl.load(labels + task * R + r, r < R, 0)
        counted = (r < R) & (y != ignored)
        mask = (r < R)[:, None] & (c < C)[None, :]
        place = (task * R + r[:, None]) * C + c[None, :]
        row, share, q = cross_entropy(tl.load(z + place, mask, 0.0), y, c, C, smoothing)
        total += tl.where(counted, row, 0.0)
        factor = tl.where(counted, scale, 0.0)
        tl.store(g + place, factor[:, None] * (share - q), mask)
        tl.store(p + place, share, mask)
        tl.store(factors + task * R + r, factor, r < R)
    tl.store(loss + task, tl.sum(total, 0) * scale)


@triton.jit
def tangent_kernel(
    z_dot, g, p, factors, loss_dot, moved,  # [T, R, C], [T, R, C], [T, R, C], [T, R], [T], [T, R, C]
    R, C,
    BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        mask = (r < R)[:, None] & (c < C)[None, :]
        place = (task * R + r[:, None]) * C + c[None, :]
        x_dot = tl.load(z_dot + place, mask, 0.0)
        share = tl.load(p + place, mask, 0.0)
        total += tl.sum(tl.load(g + place, mask, 0.0) * x_dot, 1)
        factor = tl.load(factors + task * R + r, r < R, 0.0)
        tl.store(moved + place, cross_entropy_dot(x_dot, share, factor), mask)
    tl.store(loss_dot + task, tl.sum(total, 0))


def forward(z: Tensor, labels: Tensor, ignored: int, reduction: int, smoothing: float) -> tuple[Tensor, Kept]:
    """Loss ``[T]`` and what is kept, of logits ``[T, R, C]`` and labels ``[T, R]``."""
    z, labels = z.contiguous(), labels.contiguous()
    tasks, rows, classes = z.shape
    loss = z.new_empty(tasks)
    kept = Kept(torch.empty_like(z), torch.empty_like(z), z.new_empty(tasks, rows, 1))
    block = _blocks(rows, classes)
    forward_kernel[(tasks,)](
        z, labels, loss, *kept, rows, classes, ignored, smoothing, MEAN=reduction == MEAN, **block,
        num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, kept


def tangent(kept: Kept, z_dot: Tensor) -> tuple[Tensor, Tensor]:
    """``l_dot``, ``[T]``, and ``s r p_dot``."""
    tasks, rows, classes = kept.p.shape
    loss_dot, moved = z_dot.new_empty(tasks), torch.empty_like(kept.p)
    tangent_kernel[(tasks,)](
        z_dot.contiguous(), *kept, loss_dot, moved, rows, classes, **_blocks(rows, classes),
        num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return loss_dot, moved


def _blocks(rows: int, classes: int) -> dict[str, int]:
    wide = triton.next_power_of_2(classes)
    return {"BR": max(1, min(triton.next_power_of_2(rows), 32, ELEMENTS // wide)), "BC": wide}


def shipped() -> list[Shipped]:
    """Builds for few and for many classes."""
    builds = []
    pointers = dict.fromkeys(("z", "loss", "g", "p", "factors", "z_dot", "loss_dot", "moved"), "*fp32")
    types = pointers | {"labels": "*i64", "R": "i32", "C": "i32", "ignored": "i32", "smoothing": "fp32"}
    for rows, classes in ((25, 5), (20, 20), (64, 1000)):
        for name, kernel, more in (
            ("forward", forward_kernel, {"MEAN": True}),
            ("tangent", tangent_kernel, dict[str, bool]()),
        ):
            constants = {**more, **_blocks(rows, classes)}
            signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
            builds.append(Shipped(f"cross_entropy {name}, {classes} classes", kernel, signature, constants, WARPS, 1))
    return builds

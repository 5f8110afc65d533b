"""An iteration of conjugate gradients on a GPU: three passes over the vectors; the formulas are reference.py's.

A program has a part of one task's elements. What is summed over a task is left by part and added up, in one order, by
every program of the next pass. A pass writes what a task has become beside what it was, since others still read that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_support import Shipped
from fastmeta.ops.conjugate_gradients.state import State

BLOCK = 1024
MOST_PARTS = 256  # of a task
WARPS = 4


@triton.jit
def _sum_of_parts(parts, task, PARTS, WIDE: tl.constexpr):
    i = tl.arange(0, WIDE)
    return tl.sum(tl.load(parts + task * PARTS + i, i < PARTS, 0.0), 0)


@triton.jit
def curvature_kernel(p, h, parts, shift, P, EACH, PARTS, BLOCK: tl.constexpr):
    """Parts of ``<p, q>``."""
    part = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(part * EACH, part * EACH + EACH, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        mask = i < P
        x = tl.load(p + task * P + i, mask, 0.0)
        total += x * (tl.load(h + task * P + i, mask, 0.0) + shift * x)
    tl.store(parts + task * PARTS + part, tl.sum(total, 0))


@triton.jit
def advance_kernel(
    p, h, v, r,  # [T, P]
    curvatures, squares,  # [T, PARTS]: read, written
    square, active, positive,  # [T]
    on_out, positive_out,  # [T]
    shift, P, EACH, PARTS,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``v`` and ``r`` of tasks that go on, and parts of ``<r, r>``."""
    part = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    curvature = _sum_of_parts(curvatures, task, PARTS, WIDE)
    was = tl.load(active + task)
    on = (was != 0) & (curvature > 0)
    length = tl.where(on, tl.load(square + task) / curvature, 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(part * EACH, part * EACH + EACH, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        mask = i < P
        x = tl.load(p + task * P + i, mask, 0.0)
        q = tl.load(h + task * P + i, mask, 0.0) + shift * x
        rest = tl.load(r + task * P + i, mask, 0.0)
        if on:
            rest -= length * q
            tl.store(v + task * P + i, tl.load(v + task * P + i, mask, 0.0) + length * x, mask)
            tl.store(r + task * P + i, rest, mask)
        total += rest * rest
    tl.store(squares + task * PARTS + part, tl.sum(total, 0))
    if part == 0:
        tl.store(on_out + task, on.to(tl.int8))
        right = (curvature > 0) | (was == 0)
        tl.store(positive_out + task, (right & (tl.load(positive + task) != 0)).to(tl.int8))


@triton.jit
def turn_kernel(
    p, r,  # [T, P]
    squares,  # [T, PARTS]
    square, enough, on,  # [T]
    square_out, active_out, iterations,  # [T]
    P, EACH, PARTS,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The next direction of tasks that go on, and whether they do so."""
    part = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    before = tl.load(square + task)
    going = tl.load(on + task) != 0
    after = tl.where(going, _sum_of_parts(squares, task, PARTS, WIDE), before)
    if going:
        share = after / before
        for begin in range(part * EACH, part * EACH + EACH, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            mask = i < P
            x = tl.load(r + task * P + i, mask, 0.0) + share * tl.load(p + task * P + i, mask, 0.0)
            tl.store(p + task * P + i, x, mask)
    if part == 0:
        tl.store(square_out + task, after)
        tl.store(active_out + task, (going & (after > tl.load(enough + task))).to(tl.int8))
        tl.store(iterations + task, tl.load(iterations + task) + going.to(tl.int64))


def advance(state: State, product: Tensor, shift: float) -> None:
    """One iteration; see reference.py. ``v``, ``r`` and ``p`` are written into."""
    tasks, elements = product.shape
    if not tasks or not elements:
        return
    each, parts = _parts(elements)
    curvatures, squares = product.new_empty(tasks, parts), product.new_empty(tasks, parts)
    on, positive = torch.empty_like(state.active), torch.empty_like(state.positive)
    square, active = torch.empty_like(state.square), torch.empty_like(state.active)
    h, grid, sizes = product.contiguous(), (parts, tasks), (elements, each, parts)
    wide = triton.next_power_of_2(parts)
    flags = [flag.view(torch.int8) for flag in (state.active, state.positive, on, positive, active)]
    was, was_positive, on_flag, positive_flag, active_flag = flags
    curvature_kernel[grid](
        state.p, h, curvatures, shift, *sizes, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True
    )  # fmt: skip
    advance_kernel[grid](
        state.p, h, state.v, state.r, curvatures, squares, state.square, was, was_positive, on_flag, positive_flag,
        shift, *sizes, WIDE=wide, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    turn_kernel[grid](
        state.p, state.r, squares, state.square, state.enough, on_flag, square, active_flag, state.iterations,
        *sizes, WIDE=wide, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    state.square, state.active, state.positive = square, active, positive


def _parts(elements: int) -> tuple[int, int]:
    """Elements of a part, whole blocks, and how many parts a task has."""
    each = BLOCK * triton.cdiv(elements, BLOCK * MOST_PARTS)
    return each, triton.cdiv(elements, each)


def shipped() -> list[Shipped]:
    """The three passes, for tasks of one part and of many."""
    builds = []
    types = dict.fromkeys(("shift",), "fp32") | dict.fromkeys(("P", "EACH", "PARTS"), "i32")
    types |= dict.fromkeys(("active", "positive", "on_out", "positive_out", "on", "active_out"), "*i8")
    types |= {"iterations": "*i64"}
    for parts in (1, 128):
        for name, kernel in (("curvature", curvature_kernel), ("advance", advance_kernel), ("turn", turn_kernel)):
            given = {"WIDE": parts, "BLOCK": BLOCK}
            constants = {n: value for n, value in given.items() if n in kernel.arg_names}
            if parts > 1 and "WIDE" not in constants:
                continue
            signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
            title = f"conjugate_gradients {name}, {parts} part{'s' * (parts > 1)}"
            builds.append(Shipped(title, kernel, signature, constants, WARPS, 3))
    return builds

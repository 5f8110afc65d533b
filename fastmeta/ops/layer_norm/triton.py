"""Layer norm on a GPU: a map is one pass over rows, and one over columns where scale or shift want a cotangent.

The formulas are reference.py's. A row's means are taken of the row in registers, each once; sums over a task's rows are
added up by one program a block of columns, in a fixed order.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_support import Shipped

ELEMENTS = 2048  # of the rows of one program
COLUMNS, ROWS = 32, 64  # of a program that adds up columns, and of its tiles


@triton.jit
def _mean(x, F):
    return (tl.sum(x, 1) / F)[:, None]


@triton.jit
def _features(base, task, stride, f, F):
    """A parameter of ``task`` beside its rows."""
    return tl.load(base + task * stride + f, f < F, 0.0)[None, :]


@triton.jit
def forward_kernel(
    z, c, b,  # [T, R, F], [T, F], [T, F]
    y, x, r,  # [T, R, F], [T, R, F], [T, R]
    c_task, b_task,  # distances between tasks
    R, F, eps,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    f = tl.arange(0, BF)
    inside = (row < R)[:, None] & (f < F)[None, :]
    at = (task * R + row[:, None]) * F + f[None, :]
    value = tl.load(z + at, inside, 0.0)
    value = tl.where(inside, value - _mean(value, F), 0.0)
    deviation = 1.0 / tl.sqrt(_mean(value * value, F) + eps)
    value = value * deviation
    tl.store(x + at, value, inside)
    tl.store(r + (task * R + row)[:, None], deviation, (row < R)[:, None])
    if SCALE:
        value = value * _features(c, task, c_task, f, F)
    if SHIFT:
        value += _features(b, task, b_task, f, F)
    tl.store(y + at, value, inside)


@triton.jit
def tangent_kernel(
    z_dot, x, r, c, c_dot, b_dot,
    y_dot, x_dot, turn,  # [T, R, F], [T, R, F], [T, R]
    c_task, c_dot_task, b_dot_task,
    R, F,
    INPUT: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_DOT: tl.constexpr,
    SHIFT_DOT: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    f = tl.arange(0, BF)
    inside = (row < R)[:, None] & (f < F)[None, :]
    at = (task * R + row[:, None]) * F + f[None, :]
    total = tl.zeros((BR, BF), tl.float32)
    if INPUT:
        value = tl.load(z_dot + at, inside, 0.0)
        known = tl.load(x + at, inside, 0.0)
        deviation = tl.load(r + (task * R + row)[:, None], (row < R)[:, None], 0.0)
        along = _mean(value * known, F)
        value = (value - _mean(value, F) - known * along) * deviation
        tl.store(x_dot + at, value, inside)
        tl.store(turn + (task * R + row)[:, None], along * deviation, (row < R)[:, None])
        total = value
        if SCALE:
            total = total * _features(c, task, c_task, f, F)
    if SCALE_DOT:
        total += tl.load(x + at, inside, 0.0) * _features(c_dot, task, c_dot_task, f, F)
    if SHIFT_DOT:
        total += _features(b_dot, task, b_dot_task, f, F)
    tl.store(y_dot + at, total, inside)


@triton.jit
def input_kernel(
    d, d_dot, x, r, x_dot, turn, c, c_dot,
    d_z,  # [T, R, F]: the cotangent of z, or its tangent
    c_task, c_dot_task,
    R, F,
    PRIMAL: tl.constexpr,  # d is read
    DOT: tl.constexpr,  # d_dot is read
    INPUT: tl.constexpr,  # x_dot and turn are read
    SCALE: tl.constexpr,
    SCALE_DOT: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    f = tl.arange(0, BF)
    inside = (row < R)[:, None] & (f < F)[None, :]
    at = (task * R + row[:, None]) * F + f[None, :]
    known = tl.load(x + at, inside, 0.0)
    deviation = tl.load(r + (task * R + row)[:, None], (row < R)[:, None], 0.0)
    d_x_dot = tl.zeros((BR, BF), tl.float32)
    if DOT:
        d_x_dot = tl.load(d_dot + at, inside, 0.0)
        if SCALE:
            d_x_dot = d_x_dot * _features(c, task, c_task, f, F)
    if PRIMAL:
        d_x = tl.load(d + at, inside, 0.0)
        if SCALE_DOT:
            d_x_dot += d_x * _features(c_dot, task, c_dot_task, f, F)
    along = _mean(d_x_dot * known, F)
    if INPUT:
        if SCALE:
            d_x = d_x * _features(c, task, c_task, f, F)
        moved = tl.load(x_dot + at, inside, 0.0)
        first = _mean(d_x * known, F)
        turned = tl.load(turn + (task * R + row)[:, None], (row < R)[:, None], 0.0)
        along += _mean(d_x * moved, F)
        bent = moved * first + turned * (d_x - _mean(d_x, F) - known * first)
    d_x_dot = d_x_dot - _mean(d_x_dot, F) - known * along
    if INPUT:
        d_x_dot -= bent
    tl.store(d_z + at, d_x_dot * deviation, inside)


@triton.jit
def columns_kernel(
    d, d_dot, x, x_dot,
    d_c, d_b,  # [T, F]: the cotangents of scale and shift, or their tangents
    R, F,
    DOT: tl.constexpr,  # d_dot is read, and is what d_b sums
    INPUT: tl.constexpr,  # d and x_dot are read
    WANT_C: tl.constexpr,
    WANT_B: tl.constexpr,
    BR: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    scale = tl.zeros((BR, BF), tl.float32)
    shift = tl.zeros((BR, BF), tl.float32)
    for start in range(0, R, BR):
        row = start + tl.arange(0, BR)
        inside = (row < R)[:, None] & (f < F)[None, :]
        at = (task * R + row[:, None]) * F + f[None, :]
        if DOT:
            change = tl.load(d_dot + at, inside, 0.0)
            shift += change
            if WANT_C:
                scale += change * tl.load(x + at, inside, 0.0)
        if INPUT:
            if WANT_C:
                scale += tl.load(d + at, inside, 0.0) * tl.load(x_dot + at, inside, 0.0)
    if WANT_C:
        tl.store(d_c + task * F + f, tl.sum(scale, 0), f < F)
    if WANT_B:
        tl.store(d_b + task * F + f, tl.sum(shift, 0), f < F)


def forward(z: Tensor, c: Tensor | None, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``x`` and ``r`` of ``z`` ``[T, R, F]``, scale and shift ``[T, F]``."""
    z = z.contiguous()
    tasks, rows, features = z.shape
    y, x, r = torch.empty_like(z), torch.empty_like(z), z.new_empty(tasks, rows, 1)
    c, b = _dense(c), _dense(b)
    grid, sizes = _rows(z)
    if y.numel():
        forward_kernel[grid](
            z, z if c is None else c, z if b is None else b, y, x, r, _task(c), _task(b), rows, features, eps,
            SCALE=c is not None, SHIFT=b is not None, **sizes,
        )  # fmt: skip
    return y, x, r


def tangent(
    x: Tensor,  # [T, R, F]
    r: Tensor,  # [T, R, 1]
    c: Tensor | None,  # [T, F]
    z_dot: Tensor | None,  # [T, R, F]
    c_dot: Tensor | None,  # [T, F]
    b_dot: Tensor | None,  # [T, F]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``y_dot``; ``x_dot`` and ``turn = mean(x z_dot) r``, ``None`` without ``z_dot``. Some tangent is given."""
    y_dot = torch.empty_like(x)
    x_dot = turn = None
    if z_dot is not None:
        z_dot, x_dot, turn = z_dot.contiguous(), torch.empty_like(x), torch.empty_like(r)
    c, c_dot, b_dot = _dense(c), _dense(c_dot), _dense(b_dot)
    grid, sizes = _rows(x)
    if y_dot.numel():
        tangent_kernel[grid](
            *(x if t is None else t for t in (z_dot, x, r, c, c_dot, b_dot, y_dot, x_dot, turn)),
            _task(c), _task(c_dot), _task(b_dot), *x.shape[1:],
            INPUT=z_dot is not None, SCALE=c is not None, SCALE_DOT=c_dot is not None, SHIFT_DOT=b_dot is not None,
            **sizes,
        )  # fmt: skip
    return y_dot, x_dot, turn


def input_cotangent(
    x: Tensor,  # [T, R, F]
    r: Tensor,  # [T, R, 1]
    c: Tensor | None,  # [T, F]
    d: Tensor | None,  # [T, R, F]
    d_dot: Tensor | None,  # [T, R, F]
    x_dot: Tensor | None = None,  # [T, R, F]
    turn: Tensor | None = None,  # [T, R, 1]
    c_dot: Tensor | None = None,  # [T, F]
) -> Tensor:  # [T, R, F]
    """Tangent of the input's cotangent; without ``x_dot`` and ``c_dot`` the cotangent itself for one ``d_dot``."""
    d_z = torch.empty_like(x)
    reads = d is not None and (x_dot is not None or c_dot is not None)
    d, d_dot = (None if t is None else t.contiguous() for t in (d, d_dot))
    c, c_dot = _dense(c), _dense(c_dot)
    grid, sizes = _rows(x)
    if d_z.numel():
        input_kernel[grid](
            *(x if t is None else t for t in (d, d_dot, x, r, x_dot, turn, c, c_dot, d_z)),
            _task(c), _task(c_dot), *x.shape[1:],
            PRIMAL=reads, DOT=d_dot is not None, INPUT=reads and x_dot is not None,
            SCALE=c is not None, SCALE_DOT=reads and c_dot is not None, **sizes,
        )  # fmt: skip
    return d_z


def parameter_cotangents(
    x: Tensor,  # [T, R, F]
    d: Tensor | None,  # [T, R, F]
    d_dot: Tensor | None,  # [T, R, F]
    x_dot: Tensor | None,  # [T, R, F]
    want_scale: bool,
    want_shift: bool,
) -> tuple[Tensor | None, Tensor | None]:  # [T, F]
    """Tangents of the cotangents of scale and shift; without ``x_dot`` the cotangents themselves for one ``d_dot``."""
    tasks, rows, features = x.shape
    d_c, d_b = (x.new_empty(tasks, features) if wanted else None for wanted in (want_scale, want_shift))
    d, d_dot = (None if t is None else t.contiguous() for t in (d, d_dot))
    if (want_scale or want_shift) and tasks and features:
        columns_kernel[(triton.cdiv(features, COLUMNS), tasks)](
            *(x if t is None else t for t in (d, d_dot, x, x_dot, d_c, d_b)), rows, features,
            DOT=d_dot is not None, INPUT=d is not None and x_dot is not None, WANT_C=want_scale, WANT_B=want_shift,
            BR=ROWS, BF=COLUMNS, num_warps=4, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    return d_c, d_b


def _rows(x: Tensor) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """The grid of a kernel over rows, and its constants."""
    tasks, rows, features = x.shape
    sizes = _sizes(rows, features)
    warps = sizes.pop("warps")
    return (triton.cdiv(rows, sizes["BR"]), tasks), {
        **sizes, "num_warps": warps, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip


def _sizes(rows: int, features: int) -> dict[str, int]:
    wide = triton.next_power_of_2(features)
    block = max(1, min(triton.next_power_of_2(rows), ELEMENTS // wide))
    return {"BR": block, "BF": wide, "warps": 8 if wide > 2048 else 4}


def _dense(parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or parameter.stride(-1) == 1 else parameter.contiguous()


def _task(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.stride(0)


def shipped() -> list[Shipped]:
    """Builds for a narrow and a wide transformer."""
    names = {"R": "i32", "F": "i32", "eps": "fp32", "c_task": "i32", "c_dot_task": "i32", "b_task": "i32"}
    builds = []
    for features in (384, 4096):
        for name, kernel in (("forward", forward_kernel), ("tangent", tangent_kernel), ("input", input_kernel)):
            sizes = _sizes(1024, features)
            warps = sizes.pop("warps")
            builds.append(_build(f"layer_norm {name}, {features} features", kernel, names, sizes, warps, 1))
    builds.append(_build("layer_norm columns", columns_kernel, names, {"BR": ROWS, "BF": COLUMNS}, 4, 2))
    return builds


def _build(
    label: str, kernel: triton.JITFunction, names: dict[str, str], sizes: dict[str, int], warps: int, stages: int
) -> Shipped:
    flags = {n: True for n in kernel.arg_names if n.isupper() and n not in ("R", "F", "BR", "BF")}
    types = names | {"b_dot_task": "i32"} | dict.fromkeys({**flags, **sizes}, "constexpr")
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names}
    return Shipped(label, kernel, signature, {**flags, **sizes}, warps, stages)

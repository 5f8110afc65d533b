"""Blocks whose input has a few elements a patch, such as a network's first: ``z`` is computed anew wherever it is read.

One small product of patches and weight is quicker than to read an image that is many times larger than the input. So
neither ``z`` nor ``z_dot``, ``d_z`` and ``d_z_dot`` exist: what is kept and passed on has the size of the input or of
the windows. That holds where no cotangent of the input is wanted and it has no tangent; else ``z`` is formed, and the
kernels of ``triton_products`` and ``triton_norm`` do the rest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.core.triton_dot import dot
from fastmeta.ops.conv_block.triton_norm import (
    PARAMETERS,
    SIZES,
    activated,
    channel,
    gathered,
    moved,
    normal,
    parameter,
)
from fastmeta.ops.conv_block.triton_products import patch

WEIGHTS = ("w_task", "w_dot_task", "in_height", "in_width")


@triton.jit
def _weight(W, t, task, columns, PATCH: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """A packed weight's columns, ``[BK, columns]``."""
    f = tl.arange(0, BK)
    inside = (f < PATCH)[:, None] & (columns < C)[None, :]
    return tl.load(W + t * task + f[:, None] * C + columns[None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=[*WEIGHTS, *PARAMETERS, *SIZES])
def moments(
    X,  # [T, N, in_height, in_width, CI]
    W,  # [T or 1, taps * CI, C]
    WDot,  # like W, or None
    Bias,  # [T or 1, C] or None
    Mean,  # [T, C], with WDot
    Rstd,
    Partial,  # [T, blocks, 2, C]
    w_task,
    w_dot_task,
    bias_task,
    in_height,
    in_width,
    images,
    height,
    width,
    CI: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of ``BM`` positions: mean and squared deviations of ``z``; with ``WDot``, sums of ``z_dot`` and ``x z_dot``."""
    block = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    rows = images * height * width
    m = block * BM + tl.arange(0, BM)
    valid = m < rows
    line = m // width
    x = t * images * in_height * in_width * CI + X
    n = line // height
    a = patch(
        x, n, line % height, m % width, valid, 0, in_height, in_width, CI, KH, KW, SH, SW, PH, PW, False, BK
    )  # fmt: skip
    z = dot(a, _weight(W, t, w_task, columns, KH * KW * CI, C, BK), tl.zeros((BM, BC), tl.float32), PRECISION)
    if Bias is not None:
        z += parameter(Bias, t, bias_task, columns, C)[None, :]
    if WDot is None:
        first = tl.sum(tl.where(valid[:, None], z, 0.0), 0) / tl.minimum(rows - block * BM, BM).to(tl.float32)
        gap = tl.where(valid[:, None], z - first[None, :], 0.0)
        second = tl.sum(gap * gap, 0)
    else:
        w_dot = _weight(WDot, t, w_dot_task, columns, KH * KW * CI, C, BK)
        z_dot = dot(a, w_dot, tl.zeros((BM, BC), tl.float32), PRECISION)
        first = tl.sum(z_dot, 0)
        normalised = (z - channel(Mean, t, columns, C)[None, :]) * channel(Rstd, t, columns, C)[None, :]
        second = tl.sum(z_dot * normalised, 0)
    into = Partial + (t * tl.num_programs(0) + block) * 2 * C + columns
    tl.store(into, first, mask=columns < C)
    tl.store(into + C, second, mask=columns < C)


@triton.jit(do_not_specialize=[*WEIGHTS, *PARAMETERS, *SIZES])
def windows(
    X,  # [T, N, in_height, in_width, CI]
    W,  # [T or 1, taps * CI, C]
    WDot,  # like W, or None
    Bias,  # [T or 1, C] or None
    Mean,  # [T, C]
    Rstd,
    Moves,  # [T, 2, C] of ``moments``, with WDot
    Scale,  # [T or 1, C] or None
    Shift,
    ScaleDot,
    ShiftDot,
    Code,  # uint8 [T, N, rows_y, rows_x, C]: written, or read with WDot
    Peak,  # like Code, likewise
    Y,  # like Code: y, or y_dot
    PeakDot,  # like Code, with WDot
    w_task,
    w_dot_task,
    bias_task,
    scale_task,
    shift_task,
    scale_dot_task,
    shift_dot_task,
    in_height,
    in_width,
    images,
    height,
    width,
    rows_y,
    rows_x,
    slope,
    CI: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    WSH: tl.constexpr,
    WSW: tl.constexpr,
    WPH: tl.constexpr,
    WPW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``y``, codes and peaks; with ``WDot``, ``y_dot`` and the peaks' tangents. Windows have the constants ``W*``."""
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    rows = images * rows_y * rows_x
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    valid = m < rows
    left = m % rows_x * WSW - WPW
    line = m // rows_x
    top = line % rows_y * WSH - WPH
    n = line // rows_y
    inside = valid[:, None] & (columns < C)[None, :]
    at = t * rows * C + m[:, None] * C + columns[None, :]
    x = t * images * in_height * in_width * CI + X
    if WDot is None:
        w = _weight(W, t, w_task, columns, KH * KW * CI, C, BK)
        best = tl.full((BM, BC), float("-inf"), tl.float32)
        where = tl.full((BM, BC), -1, tl.int32)
    else:
        w = _weight(WDot, t, w_dot_task, columns, KH * KW * CI, C, BK)
        where = tl.load(Code + at, mask=inside, other=0).to(tl.int32)
        best = tl.zeros((BM, BC), tl.float32)
    peak = tl.zeros((BM, BC), tl.float32)
    for tap in tl.static_range(WH * WW):
        row = top + tap // WW
        column = left + tap % WW
        ok = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        a = patch(x, n, row, column, ok, 0, in_height, in_width, CI, KH, KW, SH, SW, PH, PW, False, BK)
        z = dot(a, w, tl.zeros((BM, BC), tl.float32), PRECISION)
        if WDot is None:
            if Bias is not None:
                z += parameter(Bias, t, bias_task, columns, C)[None, :]
            u, code = activated(
                z, t, columns, Mean, Rstd, Scale, scale_task, Shift, shift_task, slope, tap, C, ACTIVATION
            )  # fmt: skip
            take = ok[:, None] & ((u > best) | (u != u) | (where < 0))
            best = tl.where(take, u, best)
            peak = tl.where(take, z, peak)
            where = tl.where(take, code, where)
        else:
            peak = tl.where((where & 127) == tap, z, peak)
    if WDot is None:
        tl.store(Code + at, where.to(tl.uint8), mask=inside)
        tl.store(Peak + at, peak, mask=inside)
        tl.store(Y + at, best, mask=inside)
    else:
        tl.store(PeakDot + at, peak, mask=inside)
        y_dot = moved(
            peak, tl.load(Peak + at, mask=inside, other=0.0), t, columns, images * height * width, Mean, Rstd, Moves,
            Scale, scale_task, ScaleDot, scale_dot_task, ShiftDot, shift_dot_task, C,
        )  # fmt: skip
        tl.store(Y + at, tl.where(where < 128, y_dot, y_dot * slope), mask=inside)


@triton.jit(do_not_specialize=[*WEIGHTS, *PARAMETERS, *SIZES, "span"])
def correlation(
    X,  # [T, N, in_height, in_width, CI]
    W,  # [T or 1, taps * CI, C]
    WDot,  # like W, with DDot; None where only other parameters have a tangent
    Bias,  # [T or 1, C] or None
    D,  # [T, N, rows_y, rows_x, C]
    DDot,  # like D, or None
    Code,  # uint8, like D
    Mean,  # [T, C]
    Rstd,
    Scale,  # [T or 1, C] or None
    ScaleDot,
    Moves,  # [T, 2, C], with DDot
    Sums,  # [T, Q, C] of ``window_sums``
    Partial,  # [T, pieces, taps * CI, C]
    w_task,
    w_dot_task,
    bias_task,
    scale_task,
    scale_dot_task,
    in_height,
    in_width,
    images,
    height,
    width,
    rows_y,
    rows_x,
    slope,
    span,
    CI: tl.constexpr,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    WSH: tl.constexpr,
    WSW: tl.constexpr,
    WPH: tl.constexpr,
    WPW: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A weight's cotangent ``corr(x, d_z)``, with ``DDot`` its tangent ``corr(x, d_z_dot)``, of ``span`` positions."""
    piece = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    count = images * height * width
    start = piece * span
    stop = tl.minimum(start + span, count)
    base = t * images * rows_y * rows_x * C
    x = t * images * in_height * in_width * CI + X
    w = _weight(W, t, w_task, columns, KH * KW * CI, C, BK)
    acc = tl.zeros((BK, BC), tl.float32)
    for m0 in range(start, stop, BM):
        m = m0 + tl.arange(0, BM)
        valid = m < stop
        line = m // width
        n = line // height
        a = patch(
            x, n, line % height, m % width, valid, 0, in_height, in_width, CI, KH, KW, SH, SW, PH, PW, False, BK
        )  # fmt: skip
        z = dot(a, w, tl.zeros((BM, BC), tl.float32), PRECISION)
        if Bias is not None:
            z += parameter(Bias, t, bias_task, columns, C)[None, :]
        z_dot = tl.zeros((BM, BC), tl.float32)
        if WDot is not None:
            z_dot = dot(a, _weight(WDot, t, w_dot_task, columns, KH * KW * CI, C, BK), z_dot, PRECISION)
        g, g_dot = gathered(
            D, DDot, Code, base, n, line % height + WPH, m % width + WPW, valid[:, None] & (columns < C)[None, :],
            columns, rows_y, rows_x, slope, C, WH, WW, WSH, WSW, BM, BC,
        )  # fmt: skip
        _, d_z_dot = normal(
            g, g_dot, z, z_dot, t, columns, count, Mean, Rstd, Scale, scale_task, ScaleDot, scale_dot_task, Moves,
            Sums, C, Q,
        )  # fmt: skip
        # what lies beyond the end has an empty patch, so that its cotangent meets zeros
        acc = dot(tl.trans(a), d_z_dot, acc, PRECISION)
    f = tl.arange(0, BK)
    inside = (f < KH * KW * CI)[:, None] & (columns < C)[None, :]
    into = Partial + (t * tl.num_programs(0) + piece) * (KH * KW * CI * C)
    tl.store(into + f[:, None] * C + columns[None, :], acc, mask=inside)

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
from fastmeta.ops.conv_block.triton_norm import PARAMETERS, SIZES, activated, channel, moved, parameter
from fastmeta.ops.conv_block.triton_products import patch, places, places_after

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


@triton.jit(do_not_specialize=["in_height", "in_width", "images", "height", "width", "span"])
def covariance(
    X,  # [T, N, in_height, in_width, CI]
    Middle,  # [T, CI]: a mean of every channel
    Partial,  # [T, pieces, BK + 1, BK]
    in_height,
    in_width,
    images,
    height,
    width,
    span,
    CI: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of ``span`` positions: products of their patches, less the channels' means, with themselves; and their sum."""
    piece = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    count = images * height * width
    start = piece * span
    stop = tl.minimum(start + span, count)
    f = tl.arange(0, BK)
    middle = _middle(Middle, t, CI, KH * KW * CI, BK)
    x = t * images * in_height * in_width * CI + X
    total = tl.zeros((BM, BK), tl.float32)
    acc = tl.zeros((BK, BK), tl.float32)
    column, row, n = places(start + tl.arange(0, BM), width, height)
    for m0 in range(start, stop, BM):
        valid = m0 + tl.arange(0, BM) < stop
        a = patch(x, n, row, column, valid, 0, in_height, in_width, CI, KH, KW, SH, SW, PH, PW, False, BK)
        a = tl.where(valid[:, None], a - middle[None, :], 0.0)
        total += a
        acc = dot(tl.trans(a), a, acc, PRECISION)
        column, row, n = places_after(column, row, n, BM, width, height)
    into = Partial + (t * tl.num_programs(0) + piece) * ((BK + 1) * BK)
    tl.store(into + f[:, None] * BK + f[None, :], acc)
    tl.store(into + BK * BK + f, tl.sum(total, 0))


@triton.jit
def _middle(Middle, t, CI: tl.constexpr, PATCH: tl.constexpr, BK: tl.constexpr):
    """The mean of each patch element's channel."""
    f = tl.arange(0, BK)
    return tl.load(Middle + t * CI + f % CI, mask=f < PATCH, other=0.0)


@triton.jit(do_not_specialize=[*WEIGHTS, *PARAMETERS, *SIZES, "span"])
def correlation(
    X,  # [T, N, in_height, in_width, CI]
    W,  # [T or 1, taps * CI, C]
    WDot,  # like W, with DDot; None where only other parameters have a tangent
    Middle,  # [T, CI]
    Spread,  # [T, BK + 1, BK] of ``covariance``, added up
    D,  # [T, N, rows_y, rows_x, C]
    DDot,  # like D, or None
    Code,  # uint8, like D
    Rstd,  # [T, C]
    Scale,  # [T or 1, C] or None
    ScaleDot,
    Moves,  # [T, 2, C], with DDot
    Sums,  # [T, Q, C] of ``window_sums``
    Partial,  # [T, pieces, taps * CI, C]
    w_task,
    w_dot_task,
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
    EXACT: tl.constexpr,
):
    """A weight's cotangent ``corr(x, d_z)``, with ``DDot`` its tangent ``corr(x, d_z_dot)``, of ``span`` windows.

    ``d_z`` is a multiple of ``g``, of ``z``, and a constant. So its products with patches are those of ``g``, which is
    zero but at the windows' maxima, and the patches' covariance times the weight: what the first piece adds. As ``d_z``
    sums to zero, patches may be taken from their mean, and the constant has no part.
    """
    piece = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    count = images * height * width
    rows = images * rows_y * rows_x
    start = piece * span
    stop = tl.minimum(start + span, rows)
    base = t * rows * C
    x = t * images * in_height * in_width * CI + X
    f = tl.arange(0, BK)
    spread = Spread + t * ((BK + 1) * BK)
    away = tl.load(spread + BK * BK + f) / count
    mean = _middle(Middle, t, CI, KH * KW * CI, BK) + away

    rstd = channel(Rstd, t, columns, C)
    scale = rstd
    if Scale is not None:
        scale = rstd * parameter(Scale, t, scale_task, columns, C)
    m2 = channel(Sums, Q * t + 1, columns, C) / count
    turn = tl.zeros((BC,), tl.float32)
    of_z = -scale * m2 * rstd
    if Q > 2:
        q2 = channel(Moves, 2 * t + 1, columns, C) / count
        n2 = channel(Sums, Q * t + 3, columns, C) / count
        turn = -scale * rstd * q2
        if ScaleDot is not None:
            turn += rstd * parameter(ScaleDot, t, scale_dot_task, columns, C)
        of_z = (scale * rstd * q2 * m2 - turn * m2 - scale * n2) * rstd

    acc = tl.zeros((BK, BC), tl.float32)
    if piece == 0:
        together = tl.load(spread + f[:, None] * BK + f[None, :]) - count * away[:, None] * away[None, :]
        moved_by = _weight(W, t, w_task, columns, KH * KW * CI, C, BK) * of_z[None, :]
        if WDot is not None:
            of_z_dot = -scale * rstd * m2
            moved_by += _weight(WDot, t, w_dot_task, columns, KH * KW * CI, C, BK) * of_z_dot[None, :]
        acc = dot(together, moved_by, acc, EXACT)
    left, top, n = places(start + tl.arange(0, BM), rows_x, rows_y)
    for m0 in range(start, stop, BM):
        m = m0 + tl.arange(0, BM)
        inside = (m < stop)[:, None] & (columns < C)[None, :]
        at = base + (m * C)[:, None] + columns[None, :]
        code = tl.load(Code + at, mask=inside, other=255).to(tl.int32)
        g = tl.load(D + at, mask=inside, other=0.0)
        if DDot is None:
            g = g * scale[None, :]
        else:
            g = g * turn[None, :] + tl.load(DDot + at, mask=inside, other=0.0) * scale[None, :]
        g = tl.where(code < 128, g, g * slope)
        for tap in tl.static_range(WH * WW):
            row = top * WSH - WPH + tap // WW
            column = left * WSW - WPW + tap % WW
            a = patch(x, n, row, column, m < stop, 0, in_height, in_width, CI, KH, KW, SH, SW, PH, PW, False, BK)
            here = tl.where((code & 127) == tap, g, 0.0)
            acc = dot(tl.trans(a - mean[None, :]), here, acc, PRECISION)
        left, top, n = places_after(left, top, n, BM, rows_x, rows_y)
    inside = (f < KH * KW * CI)[:, None] & (columns < C)[None, :]
    into = Partial + (t * tl.num_programs(0) + piece) * (KH * KW * CI * C)
    tl.store(into + f[:, None] * C + columns[None, :], acc, mask=inside)

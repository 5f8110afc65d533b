"""What follows a convolution in a block: batch norm, activation and max pooling with their tangents, in Triton.

Memory: ``z [T, N, h, w, C]``, the result and all that belongs to a window ``[T, N, ph, pw, C]``, statistics and sums
``[T, C]``. A window's ``code`` says where in the window its maximum lies, plus 128 where the activation's slope applies
there. ``peak`` is ``z`` where the maximum lies, so that a sum over all positions of what is zero elsewhere is one over
windows. Without pooling a window is a position and ``peak`` is ``z``.

With ``x = (z - mu) r``, ``M`` positions, ``g`` the cotangent of ``c x + b`` and sums over positions (docs/maths.md,
section 2)::

    d_z     = c r (g - mean g - x mean(g x))
    x_dot   = r (z_dot - mean z_dot - x mean(x z_dot))
    d_z_dot = combination of g_dot, g, x, z_dot and 1, whose coefficients four more sums give

Partial sums are added in a fixed order by programs of their own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# What differs from call to call: one build serves all sizes, and parameters wherever they lie in a packed vector.
SIZES = ("images", "height", "width", "rows_y", "rows_x", "slope")
VECTORS = ("Bias", "Scale", "Shift", "ScaleDot", "ShiftDot")
PARAMETERS = (*VECTORS, "bias_task", "scale_task", "shift_task", "scale_dot_task", "shift_dot_task")


@triton.jit
def _combined(Partial, t, i, rows, span, blocks, columns, C: tl.constexpr):
    """Counts ``[blocks]``, means and squared deviations ``[blocks, C]`` of the partial moments ``i``."""
    inside = (i < blocks)[:, None] & (columns < C)[None, :]
    count = tl.minimum(tl.maximum(rows - i * span, 0), span)
    count = tl.where(i < blocks, count, 0).to(tl.float32)
    at = Partial + t * blocks * 2 * C + i[:, None] * (2 * C) + columns[None, :]
    mean = tl.load(at, mask=inside, other=0.0)
    gap = tl.load(at + C, mask=inside, other=0.0)
    return count, mean, gap


@triton.jit(do_not_specialize=["rows", "span", "blocks"])
def merge_moments(
    Partial,  # [T, blocks, 2, C]
    Out,  # [T, groups, 2, C]
    rows,
    span,
    blocks,
    C: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    """Mean and squared deviations of ``BB`` blocks of ``span`` positions each, from those of every block."""
    group = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    i = group * BB + tl.arange(0, BB)
    count, mean, gap = _combined(Partial, t, i, rows, span, blocks, columns, C)
    middle = tl.sum(mean * count[:, None], 0) / tl.sum(count, 0)
    away = mean - middle[None, :]
    into = Out + (t * tl.num_programs(0) + group) * 2 * C + columns
    tl.store(into, middle, mask=columns < C)
    tl.store(into + C, tl.sum(gap + away * away * count[:, None], 0), mask=columns < C)


@triton.jit(do_not_specialize=["OldMean", "OldVar", "rows", "span", "blocks", "old_task", "eps", "momentum"])
def finish_moments(
    Partial,  # [T, blocks, 2, C]
    Mean,  # [T, C]
    Rstd,
    OldMean,  # [T or 1, C] running statistics, or None
    OldVar,
    NewMean,  # [T, C]
    NewVar,
    old_task,
    rows,
    span,
    blocks,
    eps,
    momentum,
    C: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    """Mean and reciprocal deviation of every channel, and the running statistics that follow."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)
    lanes = tl.arange(0, BB)
    total = tl.zeros((BB, BC), tl.float32)
    for i0 in range(0, blocks, BB):
        count, mean, _ = _combined(Partial, t, i0 + lanes, rows, span, blocks, columns, C)
        total += mean * count[:, None]
    middle = tl.sum(total, 0) / rows
    total = tl.zeros((BB, BC), tl.float32)
    for i0 in range(0, blocks, BB):
        count, mean, gap = _combined(Partial, t, i0 + lanes, rows, span, blocks, columns, C)
        away = mean - middle[None, :]
        total += gap + away * away * count[:, None]
    squares = tl.sum(total, 0)
    inside = columns < C
    at = t * C + columns
    tl.store(Mean + at, middle, mask=inside)
    tl.store(Rstd + at, 1.0 / tl.sqrt_rn(squares / rows + eps), mask=inside)
    if OldMean is not None:
        old = tl.load(OldMean + t * old_task + columns, mask=inside, other=0.0)
        tl.store(NewMean + at, old + momentum * (middle - old), mask=inside)
        old = tl.load(OldVar + t * old_task + columns, mask=inside, other=0.0)
        unbiased = squares / tl.maximum(rows - 1, 1)
        tl.store(NewVar + at, old + momentum * (unbiased - old), mask=inside)


@triton.jit(do_not_specialize=["width", "blocks", "group"])
def fold(
    Partial,  # [T, blocks, width]
    Out,  # [T, groups, width]
    width,
    blocks,
    group,
    BB: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums of ``group`` neighbouring rows each."""
    g = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    stop = tl.minimum((g + 1) * group, blocks)
    acc = tl.zeros((BB, BC), tl.float32)
    for i0 in range(g * group, stop, BB):
        i = i0 + tl.arange(0, BB)
        inside = (i < stop)[:, None] & (columns < width)[None, :]
        acc += tl.load(Partial + (t * blocks + i[:, None]) * width + columns[None, :], mask=inside, other=0.0)
    tl.store(Out + (t * tl.num_programs(0) + g) * width + columns, tl.sum(acc, 0), mask=columns < width)


@triton.jit
def channel(V, t, columns, C: tl.constexpr):
    """One statistic or sum of every channel of a task, ``[C]``."""
    return tl.load(V + t * C + columns, mask=columns < C, other=0.0)


@triton.jit
def parameter(V, t, task, columns, C: tl.constexpr):
    """A parameter of every channel; ``task`` elements lie between those of two tasks."""
    return tl.load(V + t * task + columns, mask=columns < C, other=0.0)


@triton.jit
def activated(
    z, t, columns, Mean, Rstd, Scale, scale_task, Shift, shift_task, slope, tap,
    C: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """``act(c x + b)`` for one position of every window, and its code."""
    v = z
    if Mean is not None:
        v = (z - channel(Mean, t, columns, C)[None, :]) * channel(Rstd, t, columns, C)[None, :]
    if Scale is not None:
        v = v * parameter(Scale, t, scale_task, columns, C)[None, :]
    if Shift is not None:
        v = v + parameter(Shift, t, shift_task, columns, C)[None, :]
    u = v
    code = tl.full(z.shape, tap, tl.int32)
    if ACTIVATION == "relu":
        u = tl.where(v <= 0.0, 0.0, v)
        code = tl.where(v <= 0.0, tap + 128, code)
    elif ACTIVATION == "leaky_relu":
        u = tl.where(v <= 0.0, v * slope, v)
        code = tl.where(v <= 0.0, tap + 128, code)
    return u, code


@triton.jit
def moved(
    z_dot, peak, t, columns, count, Mean, Rstd, Moves, Scale, scale_task, ScaleDot, scale_dot_task, ShiftDot,
    shift_dot_task, C: tl.constexpr,
):  # fmt: skip
    """``c x_dot + c_dot x + b_dot`` of what is normalised, from ``z`` and ``z_dot`` of ``count`` positions."""
    rstd = channel(Rstd, t, columns, C)
    x = (peak - channel(Mean, t, columns, C)[None, :]) * rstd[None, :]
    q1 = channel(Moves, 2 * t, columns, C) / count
    q2 = channel(Moves, 2 * t + 1, columns, C) / count
    v_dot = (z_dot - q1[None, :] - x * q2[None, :]) * rstd[None, :]
    if Scale is not None:
        v_dot = v_dot * parameter(Scale, t, scale_task, columns, C)[None, :]
    if ScaleDot is not None:
        v_dot += x * parameter(ScaleDot, t, scale_dot_task, columns, C)[None, :]
    if ShiftDot is not None:
        v_dot += parameter(ShiftDot, t, shift_dot_task, columns, C)[None, :]
    return v_dot


@triton.jit
def gathered(
    D, DDot, Code, base, n, down, right, inside, columns, rows_y, rows_x, slope,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """What positions ``(n, down, right)`` take from the windows whose maximum they are: ``g`` and ``g_dot``."""
    g = tl.zeros((BM, BC), tl.float32)
    g_dot = tl.zeros((BM, BC), tl.float32)
    for a in tl.static_range((KH + SH - 1) // SH):
        for b in tl.static_range((KW + SW - 1) // SW):
            row = down // SH - a
            column = right // SW - b
            in_row = down - row * SH
            in_column = right - column * SW
            ok = (row >= 0) & (row < rows_y) & (in_row < KH) & (column >= 0) & (column < rows_x) & (in_column < KW)
            ok = inside & ok[:, None]
            at = base + (((n * rows_y + row) * rows_x + column) * C)[:, None] + columns[None, :]
            code = tl.load(Code + at, mask=ok, other=255).to(tl.int32)
            hit = ok & ((code & 127) == (in_row * KW + in_column)[:, None])
            value = tl.load(D + at, mask=ok, other=0.0)
            g += tl.where(hit, tl.where(code < 128, value, value * slope), 0.0)
            if DDot is not None:
                value = tl.load(DDot + at, mask=ok, other=0.0)
                g_dot += tl.where(hit, tl.where(code < 128, value, value * slope), 0.0)
    return g, g_dot


@triton.jit
def normal(
    g, g_dot, z, z_dot, t, columns, count, Mean, Rstd, Scale, scale_task, ScaleDot, scale_dot_task, Moves, Sums,
    C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """``d_z`` and, with four sums, ``d_z_dot``."""
    rstd = channel(Rstd, t, columns, C)
    scale = rstd
    if Scale is not None:
        scale = rstd * parameter(Scale, t, scale_task, columns, C)
    m1 = channel(Sums, Q * t, columns, C) / count
    m2 = channel(Sums, Q * t + 1, columns, C) / count
    x = (z - channel(Mean, t, columns, C)[None, :]) * rstd[None, :]
    centred = g - m1[None, :] - x * m2[None, :]
    d_z = scale[None, :] * centred
    d_z_dot = d_z
    if Q > 2:
        q1 = channel(Moves, 2 * t, columns, C) / count
        q2 = channel(Moves, 2 * t + 1, columns, C) / count
        n1 = channel(Sums, Q * t + 2, columns, C) / count
        n2 = channel(Sums, Q * t + 3, columns, C) / count
        x_dot = (z_dot - q1[None, :] - x * q2[None, :]) * rstd[None, :]
        # the tangents of c r, which is -c r (r q2) + c_dot r, and of what it multiplies
        turn = -scale * rstd * q2
        if ScaleDot is not None:
            turn += rstd * parameter(ScaleDot, t, scale_dot_task, columns, C)
        centred_dot = g_dot - n1[None, :] - x * n2[None, :] - x_dot * m2[None, :]
        d_z_dot = turn[None, :] * centred + scale[None, :] * centred_dot
    return d_z, d_z_dot


@triton.jit(do_not_specialize=[*PARAMETERS, *SIZES])
def activate(
    Z,  # [T, N, height, width, C]
    Mean,  # [T, C], or None without normalisation
    Rstd,
    Scale,  # [T or 1, C] or None
    Shift,
    Y,  # [T, N, rows_y, rows_x, C]
    Code,  # uint8, like Y
    Peak,  # like Y, or None
    scale_task,
    shift_task,
    images,
    height,
    width,
    rows_y,
    rows_x,
    slope,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """``y = pool(act(c x + b))``. The first maximum of a window wins, and NaN before all."""
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    rows = images * rows_y * rows_x
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    left = m % rows_x * SW - PW
    line = m // rows_x
    top = line % rows_y * SH - PH
    n = line // rows_y
    inside = (m < rows)[:, None] & (columns < C)[None, :]
    base = Z + t * images * height * width * C
    best = tl.full((BM, BC), float("-inf"), tl.float32)
    peak = tl.zeros((BM, BC), tl.float32)
    where = tl.full((BM, BC), -1, tl.int32)
    for tap in tl.static_range(KH * KW):
        row = top + tap // KW
        column = left + tap % KW
        ok = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        ok = inside & ok[:, None]
        at = ((n * height + row) * width + column) * C
        z = tl.load(base + at[:, None] + columns[None, :], mask=ok, other=0.0)
        u, code = activated(
            z, t, columns, Mean, Rstd, Scale, scale_task, Shift, shift_task, slope, tap, C, ACTIVATION
        )  # fmt: skip
        take = ok & ((u > best) | (u != u) | (where < 0))
        best = tl.where(take, u, best)
        peak = tl.where(take, z, peak)
        where = tl.where(take, code, where)
    at = t * rows * C + m[:, None] * C + columns[None, :]
    tl.store(Y + at, best, mask=inside)
    tl.store(Code + at, where.to(tl.uint8), mask=inside)
    if Peak is not None:
        tl.store(Peak + at, peak, mask=inside)


@triton.jit(do_not_specialize=[*PARAMETERS, *SIZES])
def activate_tangent(
    ZDot,  # [T, N, height, width, C]
    Code,  # [T, N, rows_y, rows_x, C]
    Peak,  # like Code; None without normalisation
    Mean,  # [T, C], or None
    Rstd,
    Moves,  # [T, 2, C]: sums of z_dot and of x z_dot, or None
    Scale,  # [T or 1, C] or None
    ScaleDot,
    ShiftDot,
    YDot,  # like Code
    PeakDot,  # like Code, or None
    scale_task,
    scale_dot_task,
    shift_dot_task,
    images,
    height,
    width,
    rows_y,
    rows_x,
    slope,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """``y_dot``: ``c x_dot + c_dot x + b_dot`` where each window's maximum lies, times the activation's slope there."""
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    rows = images * rows_y * rows_x
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (m < rows)[:, None] & (columns < C)[None, :]
    at = t * rows * C + m[:, None] * C + columns[None, :]
    code = tl.load(Code + at, mask=inside, other=0).to(tl.int32)
    line = m // rows_x
    tap = code & 127
    row = (line % rows_y * SH - PH)[:, None] + tap // KW
    column = (m % rows_x * SW - PW)[:, None] + tap % KW
    base = ZDot + t * images * height * width * C
    origin = (((line // rows_y)[:, None] * height + row) * width + column) * C + columns[None, :]
    z_dot = tl.load(base + origin, mask=inside, other=0.0)
    if PeakDot is not None:
        tl.store(PeakDot + at, z_dot, mask=inside)
    y_dot = z_dot
    if Mean is not None:
        y_dot = moved(
            z_dot, tl.load(Peak + at, mask=inside, other=0.0), t, columns, images * height * width, Mean, Rstd, Moves,
            Scale, scale_task, ScaleDot, scale_dot_task, ShiftDot, shift_dot_task, C,
        )  # fmt: skip
    tl.store(YDot + at, tl.where(code < 128, y_dot, y_dot * slope), mask=inside)


@triton.jit(do_not_specialize=["rows", "span", "slope", "count"])
def window_sums(
    D,  # [T, windows, C]
    DDot,  # like D, or None
    Code,  # like D
    Peak,  # like D; None without normalisation
    PeakDot,  # like D, with DDot
    Mean,  # [T, C]
    Rstd,
    Moves,  # [T, 2, C], with DDot
    Partial,  # [T, blocks, Q, C]
    rows,
    span,
    slope,
    count,
    C: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums over ``span`` windows: of ``g``; of ``g x``; with ``DDot`` of ``g_dot`` and ``g_dot x + g x_dot`` too."""
    block = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    stop = tl.minimum((block + 1) * span, rows)
    plain = tl.zeros((BM, BC), tl.float32)
    turned = tl.zeros((BM, BC), tl.float32)
    plain_dot = tl.zeros((BM, BC), tl.float32)
    turned_dot = tl.zeros((BM, BC), tl.float32)
    if Q > 1:
        mean = channel(Mean, t, columns, C)[None, :]
        rstd = channel(Rstd, t, columns, C)[None, :]
    if Q > 2:
        q1 = channel(Moves, 2 * t, columns, C)[None, :] / count
        q2 = channel(Moves, 2 * t + 1, columns, C)[None, :] / count
    for m0 in range(block * span, stop, BM):
        m = m0 + tl.arange(0, BM)
        inside = (m < stop)[:, None] & (columns < C)[None, :]
        at = t * rows * C + m[:, None] * C + columns[None, :]
        code = tl.load(Code + at, mask=inside, other=0)
        g = tl.load(D + at, mask=inside, other=0.0)
        g = tl.where(code < 128, g, g * slope)
        plain += g
        if Q > 1:
            x = (tl.load(Peak + at, mask=inside, other=0.0) - mean) * rstd
            turned += g * x
        if Q > 2:
            g_dot = tl.load(DDot + at, mask=inside, other=0.0)
            g_dot = tl.where(code < 128, g_dot, g_dot * slope)
            x_dot = (tl.load(PeakDot + at, mask=inside, other=0.0) - q1 - x * q2) * rstd
            plain_dot += g_dot
            turned_dot += g_dot * x + g * x_dot
    into = Partial + (t * tl.num_programs(0) + block) * Q * C + columns
    tl.store(into, tl.sum(plain, 0), mask=columns < C)
    if Q > 1:
        tl.store(into + C, tl.sum(turned, 0), mask=columns < C)
    if Q > 2:
        tl.store(into + 2 * C, tl.sum(plain_dot, 0), mask=columns < C)
        tl.store(into + 3 * C, tl.sum(turned_dot, 0), mask=columns < C)


@triton.jit(do_not_specialize=[*PARAMETERS, *SIZES])
def input_cotangent(
    D,  # [T, N, rows_y, rows_x, C]
    DDot,  # like D, or None
    Code,  # like D
    Z,  # [T, N, height, width, C]; None without normalisation
    ZDot,  # like Z, with DDot
    Mean,  # [T, C]
    Rstd,
    Scale,  # [T or 1, C] or None
    ScaleDot,
    Moves,  # [T, 2, C], with ZDot
    Sums,  # [T, Q, C] of window_sums
    DZ,  # like Z, or None
    DZDot,  # like Z, with DDot
    scale_task,
    scale_dot_task,
    images,
    height,
    width,
    rows_y,
    rows_x,
    slope,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    Q: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """``d_z`` and, with ``DDot``, ``d_z_dot``: each position takes from the windows whose maximum it is."""
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BC + tl.arange(0, BC)
    count = images * height * width
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    line = m // width
    down = line % height + PH
    right = m % width + PW
    n = line // height
    inside = (m < count)[:, None] & (columns < C)[None, :]
    base = t * images * rows_y * rows_x * C
    g, g_dot = gathered(
        D, DDot, Code, base, n, down, right, inside, columns, rows_y, rows_x, slope, C, KH, KW, SH, SW, BM, BC
    )  # fmt: skip
    at = t * count * C + m[:, None] * C + columns[None, :]
    if Mean is not None:
        z = tl.load(Z + at, mask=inside, other=0.0)
        z_dot = z
        if DDot is not None:
            z_dot = tl.load(ZDot + at, mask=inside, other=0.0)
        g, g_dot = normal(
            g, g_dot, z, z_dot, t, columns, count, Mean, Rstd, Scale, scale_task, ScaleDot, scale_dot_task, Moves,
            Sums, C, Q,
        )  # fmt: skip
    if DZ is not None:
        tl.store(DZ + at, g, mask=inside)
    if DDot is not None:
        tl.store(DZDot + at, g_dot, mask=inside)

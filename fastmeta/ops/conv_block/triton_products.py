"""The three products of a convolution and their tangents as implicit matrix products, in Triton.

    product       out  = A * B (+ A2 * B2) (+ b)     z = x * W;  z_dot = x_dot * W + x * W_dot
                  and transposed                      d_x = d_z *^T W;  d_x_dot = d_z_dot *^T W + d_z *^T W_dot
    correlation   out  = corr(A, D) (+ corr(A2, D2))  d_W;  d_W_dot = corr(x, d_z_dot) + corr(x_dot, d_z)

Memory: images ``[T, N, H, W, C]``; a weight ``[T or 1, parts, taps, O, I]``, or ``[..., I, O]`` for the transpose
(:func:`pack`): what a product sums over lies side by side, as tensor cores want it of float32. Of two parts, the first
is the weight rounded to tf32 and the second what is left of it, which spares every program the splitting. A patch
element ``f`` is ``tap * C + channel``. Where the channels fill whole tiles, a tile lies in one tap; else (the first
layer: 9 or 27 elements a patch) tap and channel are found for each column, which is im2col on the way in.

Task offsets are int64, offsets within a task int32. No sum is shared by programs: each is in a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.core.triton_dot import dot, in_parts, parts


@triton.jit
def places(m, width, height):
    """Column, row and image of positions that are counted through a task's images."""
    line = m // width
    return m % width, line % height, line // height


@triton.jit
def places_after(column, row, image, steps, width, height):
    """Those of the positions ``steps`` further on, without divisions of every one."""
    lines = steps // width
    column += steps % width
    over = column >= width
    column = tl.where(over, column - width, column)
    row += lines % height + over.to(tl.int32)
    over = row >= height
    row = tl.where(over, row - height, row)
    return column, row, image + lines // height + over.to(tl.int32)


@triton.jit
def patch(
    A,
    n,
    y,
    x,
    valid,
    f0,
    height,
    width,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BF: tl.constexpr,
):
    """Elements ``f0 .. f0 + BF`` of the patches at result positions ``(n, y, x)``: ``[positions, BF]``."""
    if C % BF == 0:
        tap = f0 // C
        c = tl.multiple_of(f0 % C, BF) + tl.arange(0, BF)  # so that elements are loaded four at a time
        row = y * SH - PH + tap // KW
        column = x * SW - PW + tap % KW
        ok = valid
        if TRANSPOSED:
            row = y + PH - tap // KW
            column = x + PW - tap % KW
            ok = ok & (row >= 0) & (column >= 0)
            if SH > 1:
                ok = ok & (row % SH == 0)
                row = row // SH
            if SW > 1:
                ok = ok & (column % SW == 0)
                column = column // SW
        ok = ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = ((n * height + row) * width + column) * C
        tile = tl.load(A + at[:, None] + c[None, :], mask=ok[:, None], other=0.0)
    else:
        f = f0 + tl.arange(0, BF)
        tap = f // C
        c = f % C
        row = (y * SH - PH)[:, None] + (tap // KW)[None, :]
        column = (x * SW - PW)[:, None] + (tap % KW)[None, :]
        ok = valid[:, None] & (f < KH * KW * C)[None, :]
        if TRANSPOSED:
            row = (y + PH)[:, None] - (tap // KW)[None, :]
            column = (x + PW)[:, None] - (tap % KW)[None, :]
            ok = ok & (row >= 0) & (column >= 0)
            if SH > 1:
                ok = ok & (row % SH == 0)
                row = row // SH
            if SW > 1:
                ok = ok & (column % SW == 0)
                column = column // SW
        ok = ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = ((n[:, None] * height + row) * width + column) * C + c[None, :]
        tile = tl.load(A + at, mask=ok, other=0.0)
    return tile


@triton.jit
def _accumulate(
    acc,
    A,
    B,
    n,
    y,
    x,
    valid,
    columns,
    height,
    width,
    CK: tl.constexpr,
    CN: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus one convolution's product for these positions and columns."""
    k = tl.arange(0, BK)
    for f0 in range(0, KH * KW * CK, BK):
        a = patch(A, n, y, x, valid, f0, height, width, CK, KH, KW, SH, SW, PH, PW, TRANSPOSED, BK)
        if CK % BK == 0:
            at = (f0 // CK * CN + columns)[None, :] * CK + (tl.multiple_of(f0 % CK, BK) + k)[:, None]
        else:
            at = (((f0 + k) // CK * CN)[:, None] + columns[None, :]) * CK + ((f0 + k) % CK)[:, None]
        inside = (columns < CN)[None, :]
        if KH * KW * CK % BK != 0:
            inside = inside & (f0 + k < KH * KW * CK)[:, None]
        b = tl.load(B + at, mask=inside, other=0.0)
        if PARTS == 1:
            acc = dot(a, b, acc, PRECISION)
        else:
            rest = tl.load(B + KH * KW * CK * CN + at, mask=inside, other=0.0)
            if PRECISION == "tf32x3":
                large, small = parts(a)
                acc += in_parts(large, small, b, rest)
            else:
                acc = dot(a, b + rest, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["Bias", "bias_task", "images", "height", "width", "rows_y", "rows_x"])
def product(
    A,  # [T, N, height, width, CK]
    B,  # [T or 1, parts, taps, CN, CK]
    A2,  # like A and B, or None
    B2,
    Bias,  # [T or 1, CN] or None
    Out,  # [T, N, rows_y, rows_x, CN]
    Partial,  # [T, blocks, 2, CN] or None: sums for the normalisation
    Z,  # like Out: what Out is the tangent of, or None
    Mean,  # [T, CN], with Z
    Rstd,
    b_task,
    b2_task,
    bias_task,
    images,
    height,
    width,
    rows_y,
    rows_x,
    CK: tl.constexpr,
    CN: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A convolution or its transpose for ``BM`` positions of a task and ``BN`` channels.

    ``Partial`` gets, of these positions, mean and sum of squared deviations of each channel; with ``Z``, the sums of
    ``z_dot`` and of ``x z_dot`` where ``x`` is ``z`` normalised.
    """
    block = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BN + tl.arange(0, BN)
    rows = images * rows_y * rows_x
    m = block * BM + tl.arange(0, BM)
    valid = m < rows
    x = m % rows_x
    line = m // rows_x
    y = line % rows_y
    n = line // rows_y
    size = images * height * width * CK
    acc = tl.zeros((BM, BN), tl.float32)
    acc = _accumulate(
        acc, A + t * size, B + t * b_task, n, y, x, valid, columns, height, width,
        CK, CN, KH, KW, SH, SW, PH, PW, TRANSPOSED, BK, PARTS, PRECISION,
    )  # fmt: skip
    if A2 is not None:
        acc = _accumulate(
            acc, A2 + t * size, B2 + t * b2_task, n, y, x, valid, columns, height, width,
            CK, CN, KH, KW, SH, SW, PH, PW, TRANSPOSED, BK, PARTS, PRECISION,
        )  # fmt: skip
    if Bias is not None:
        acc += tl.load(Bias + t * bias_task + columns, mask=columns < CN, other=0.0)[None, :]
    inside = valid[:, None] & (columns < CN)[None, :]
    at = t * rows * CN + m[:, None] * CN + columns[None, :]
    tl.store(Out + at, acc, mask=inside)
    if Partial is not None:
        kept = tl.where(valid[:, None], acc, 0.0)
        first = tl.sum(kept, 0)
        if Z is None:
            first = first / tl.minimum(rows - block * BM, BM).to(tl.float32)
            gap = tl.where(valid[:, None], acc - first[None, :], 0.0)
            second = tl.sum(gap * gap, 0)
        else:
            mean = tl.load(Mean + t * CN + columns, mask=columns < CN, other=0.0)
            rstd = tl.load(Rstd + t * CN + columns, mask=columns < CN, other=0.0)
            z = tl.load(Z + at, mask=inside, other=0.0)
            second = tl.sum(kept * ((z - mean[None, :]) * rstd[None, :]), 0)
        into = Partial + (t * tl.num_programs(0) + block) * 2 * CN + columns
        tl.store(into, first, mask=columns < CN)
        tl.store(into + CN, second, mask=columns < CN)


@triton.jit
def _correlate(
    acc,
    A,
    D,
    start,
    stop,
    f0,
    columns,
    height,
    width,
    rows_y,
    rows_x,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the products of patches of ``A`` and rows of ``D`` over positions ``start .. stop``."""
    x, y, n = places(start + tl.arange(0, BM), rows_x, rows_y)
    for m0 in range(start, stop, BM):
        m = m0 + tl.arange(0, BM)
        valid = m < stop
        a = patch(A, n, y, x, valid, f0, height, width, CI, KH, KW, SH, SW, PH, PW, False, BF)
        inside = valid[:, None] & (columns < CO)[None, :]
        d = tl.load(D + m[:, None] * CO + columns[None, :], mask=inside, other=0.0)
        acc = dot(tl.trans(a), d, acc, PRECISION)
        x, y, n = places_after(x, y, n, BM, rows_x, rows_y)
    return acc


@triton.jit(do_not_specialize=["images", "height", "width", "rows_y", "rows_x", "span"])
def correlation(
    A,  # [T, N, height, width, CI]
    D,  # [T, N, rows_y, rows_x, CO]
    A2,  # like A and D, or None
    D2,
    Partial,  # [T, pieces, taps * CI, CO]
    images,
    height,
    width,
    rows_y,
    rows_x,
    span,
    CI: tl.constexpr,
    CO: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    BF: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A weight's cotangent from ``span`` positions of a task, for ``BF`` patch elements and ``BN`` channels."""
    TILES: tl.constexpr = (CO + BN - 1) // BN
    tile = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    f0 = tile // TILES * BF
    columns = tile % TILES * BN + tl.arange(0, BN)
    rows = images * rows_y * rows_x
    start = piece * span
    stop = tl.minimum(start + span, rows)
    size = images * height * width * CI
    acc = tl.zeros((BF, BN), tl.float32)
    acc = _correlate(
        acc, A + t * size, D + t * rows * CO, start, stop, f0, columns, height, width, rows_y, rows_x,
        CI, CO, KH, KW, SH, SW, PH, PW, BM, BF, PRECISION,
    )  # fmt: skip
    if A2 is not None:
        acc = _correlate(
            acc, A2 + t * size, D2 + t * rows * CO, start, stop, f0, columns, height, width, rows_y, rows_x,
            CI, CO, KH, KW, SH, SW, PH, PW, BM, BF, PRECISION,
        )  # fmt: skip
    f = f0 + tl.arange(0, BF)
    inside = (f < KH * KW * CI)[:, None] & (columns < CO)[None, :]
    into = Partial + (t * tl.num_programs(2) + piece) * (KH * KW * CI * CO)
    tl.store(into + f[:, None] * CO + columns[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["W", "w_task"])
def pack(
    W,  # [T or 1, O, I, taps]
    Straight,  # [T or 1, parts, taps, O, I]
    Turned,  # [T or 1, parts, taps, I, O]
    w_task,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    PARTS: tl.constexpr,
    BQ: tl.constexpr,
    BO: tl.constexpr,
):
    """A weight in PyTorch's order as a convolution reads it, and as its transpose does."""
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    t = tl.program_id(2).to(tl.int64)
    inside = (q < CI * TAPS)[:, None] & (o < CO)[None, :]
    value = tl.load(W + t * w_task + o[None, :] * (CI * TAPS) + q[:, None], mask=inside, other=0.0)
    tap = q % TAPS
    i = q // TAPS
    size = CI * TAPS * CO
    straight = Straight + t * (PARTS * size) + (tap[:, None] * CO + o[None, :]) * CI + i[:, None]
    turned = Turned + t * (PARTS * size) + (tap * CI + i)[:, None] * CO + o[None, :]
    if PARTS == 2:
        value, rest = parts(value)
        tl.store(straight + size, rest, mask=inside)
        tl.store(turned + size, rest, mask=inside)
    tl.store(straight, value, mask=inside)
    tl.store(turned, value, mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def collect(
    Partial,  # [T, pieces, taps * I, O]
    Out,  # [T, O, I, taps]
    pieces,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    BQ: tl.constexpr,
    BO: tl.constexpr,
):
    """The sum of a weight cotangent's pieces, in PyTorch's order."""
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    t = tl.program_id(2).to(tl.int64)
    inside = (q < CI * TAPS)[:, None] & (o < CO)[None, :]
    f = q % TAPS * CI + q // TAPS
    at = Partial + t * pieces * (CI * TAPS * CO) + f[:, None] * CO + o[None, :]
    acc = tl.zeros((BQ, BO), tl.float32)
    for _ in range(pieces):
        acc += tl.load(at, mask=inside, other=0.0)
        at += CI * TAPS * CO
    tl.store(Out + t * (CI * TAPS * CO) + o[None, :] * (CI * TAPS) + q[:, None], acc, mask=inside)

"""The kernels of pooling: each result gathers what it is made of, in a fixed order, and nothing is added atomically.

Images are ``[B, H, W, C]`` in memory. A program owns ``BM`` places of a result and ``BC`` channels. Of large windows it
reads ``BK`` pixels at a time, and adds those up, or takes their maximum, at the end.

Places count through all images, of which there may be more than 2^31; what lies within one image is counted in int32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(M, plane, BM: tl.constexpr):
    """A program's first place, its places' images and places within them, and which of them there are."""
    first = tl.program_id(0).to(tl.int64) * BM
    m = tl.arange(0, BM)
    image = first // plane
    place = (first - image * plane).to(tl.int32) + m
    return first, image + place // plane, place % plane, first + m < M


@triton.jit
def _channels(C, BC: tl.constexpr):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return c, c < C


@triton.jit
def _bounds(o, SIZE, COUNT, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Along one axis of SIZE pixels: where window ``o`` of COUNT starts and ends, and its length with padding."""
    if ADAPTIVE:
        start = o * SIZE // COUNT
        end = ((o + 1) * SIZE + COUNT - 1) // COUNT
        padded = end - start
    else:
        start = o * S - P
        end = tl.minimum(start + K, SIZE + P)
        padded = end - start
        start = tl.maximum(start, 0)
        end = tl.minimum(end, SIZE)
    return start, end, padded


@triton.jit
def _earliest(r, SIZE, COUNT, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The first of the at most N windows that may have pixel ``r``; below zero there are none."""
    if ADAPTIVE:
        return r * COUNT // SIZE
    else:
        return (r + P) // S - (N - 1)


@triton.jit
def _divisor(rows, columns, padded_rows, padded_columns, COUNT_PAD: tl.constexpr, DIVISOR: tl.constexpr):
    if DIVISOR != 0:
        return tl.zeros_like(rows).to(tl.float32) + DIVISOR
    elif COUNT_PAD:
        return (padded_rows * padded_columns).to(tl.float32)
    else:
        return (rows * columns).to(tl.float32)


@triton.jit
def maximum_kernel(
    x, y, i,  # [B, H, W, C], [B, h, w, C], [B, h, w, C]
    M, H, W, h, w, C,  # M = B h w
    KH: tl.constexpr, KW: tl.constexpr,  # the window
    SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, image, place, there = _places(M, h * w, BM)
    c, known = _channels(C, BC)
    top, left = (place // w) * SH - PH, (place % w) * SW - PW
    start = x + image * (H * W * C)
    nowhere = H * W
    best = tl.zeros((BM, BK, BC), tl.float32) - float("inf")
    at = tl.zeros((BM, BK, BC), tl.int32) + nowhere
    for begin in range(0, KH * KW, BK):
        k = begin + tl.arange(0, BK)
        row, column = top[:, None] + (k // KW * DH)[None, :], left[:, None] + (k % KW * DW)[None, :]
        within = (row >= 0) & (row < H) & (column >= 0) & (column < W) & (k < KH * KW)[None, :] & there[:, None]
        position = (row * W + column)[:, :, None]
        read = within[:, :, None] & known[None, None, :]
        value = tl.load(start[:, None, None] + position * C + c[None, None, :], read, -float("inf"))
        take = read & ((value > best) | (value != value) | (at == nowhere))
        best = tl.where(take, value, best)
        at = tl.where(take, position, at)
    # Of equal values the first one counts, of those that are no numbers the last one, as in PyTorch.
    wrong = best != best
    last = tl.max(tl.where(wrong, at, -1), 1)
    best = tl.where(wrong, -float("inf"), best)
    most = tl.max(best, 1)
    chosen = tl.min(tl.where(best == most[:, None, :], at, nowhere), 1)
    write = there[:, None] & known[None, :]
    to = first * C + (tl.arange(0, BM)[:, None] * C + c[None, :])
    tl.store(y + to, tl.where(last >= 0, float("nan"), most), write)
    tl.store(i + to, tl.where(last >= 0, last, chosen).to(i.dtype.element_ty), write)


@triton.jit
def maximum_tangent_kernel(
    x_dot, i, y_dot,  # [B, H, W, C], [B, h, w, C], [B, h, w, C]
    M, H, W, h, w, C,  # M = B h w
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, image, _, there = _places(M, h * w, BM)
    c, known = _channels(C, BC)
    inside = there[:, None] & known[None, :]
    to = first * C + (tl.arange(0, BM)[:, None] * C + c[None, :])
    position = tl.load(i + to, inside, 0).to(tl.int32)
    start = x_dot + image * (H * W * C)
    picked = tl.load(start[:, None] + position * C + c[None, :], inside & (position < H * W), 0.0)
    tl.store(y_dot + to, picked, inside)


@triton.jit
def maximum_transpose_kernel(
    d, i, d_x,  # [B, h, w, C], [B, h, w, C], [B, H, W, C]
    M, H, W, h, w, C,  # M = B H W
    NH: tl.constexpr, NW: tl.constexpr,  # as many windows may have one pixel
    SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, image, place, there = _places(M, H * W, BM)
    c, known = _channels(C, BC)
    inside = there[:, None] & known[None, :]
    row, column = _earliest(place // W, H, h, NH, SH, PH, False), _earliest(place % W, W, w, NW, SW, PW, False)
    start = image * (h * w * C)
    total = tl.zeros((BM, BC), tl.float32)
    for k in range(NH * NW):
        y, x = row + k // NW, column + k % NW
        read = inside & ((y >= 0) & (y < h) & (x >= 0) & (x < w))[:, None]
        at = start[:, None] + ((y * w + x)[:, None] * C + c[None, :])
        chosen = tl.load(i + at, read, -1).to(tl.int32)
        value = tl.load(d + at, read, 0.0)
        total += tl.where(chosen == place[:, None], value, 0.0)
    tl.store(d_x + first * C + (tl.arange(0, BM)[:, None] * C + c[None, :]), total, inside)


@triton.jit
def average_kernel(
    x, y,  # [B, H, W, C], [B, h, w, C]
    M, H, W, h, w, C,  # M = B h w
    KH: tl.constexpr, KW: tl.constexpr,  # the window, or the largest of adaptive ones
    SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,  # zero: the window's size
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, image, place, there = _places(M, h * w, BM)
    c, known = _channels(C, BC)
    top, bottom, padded_rows = _bounds(place // w, H, h, KH, SH, PH, ADAPTIVE)
    left, right, padded_columns = _bounds(place % w, W, w, KW, SW, PW, ADAPTIVE)
    start = x + image * (H * W * C)
    total = tl.zeros((BM, BK, BC), tl.float32)
    for begin in range(0, KH * KW, BK):
        k = begin + tl.arange(0, BK)
        row, column = top[:, None] + (k // KW)[None, :], left[:, None] + (k % KW)[None, :]
        within = (row < bottom[:, None]) & (column < right[:, None]) & there[:, None]
        at = (row * W + column)[:, :, None] * C + c[None, None, :]
        total += tl.load(start[:, None, None] + at, within[:, :, None] & known[None, None, :], 0.0)
    count = _divisor(bottom - top, right - left, padded_rows, padded_columns, COUNT_PAD, DIVISOR)
    to = first * C + (tl.arange(0, BM)[:, None] * C + c[None, :])
    tl.store(y + to, tl.sum(total, 1) / count[:, None], there[:, None] & known[None, :])


@triton.jit
def average_transpose_kernel(
    d, d_x,  # [B, h, w, C], [B, H, W, C]
    M, H, W, h, w, C,  # M = B H W
    NH: tl.constexpr, NW: tl.constexpr,  # as many windows may have one pixel
    KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_PAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first, image, place, there = _places(M, H * W, BM)
    c, known = _channels(C, BC)
    inside = there[:, None] & known[None, :]
    r, q = place // W, place % W
    row, column = _earliest(r, H, h, NH, SH, PH, ADAPTIVE), _earliest(q, W, w, NW, SW, PW, ADAPTIVE)
    start = d + image * (h * w * C)
    total = tl.zeros((BM, BC), tl.float32)
    for k in range(NH * NW):
        y, x = row + k // NW, column + k % NW
        top, bottom, padded_rows = _bounds(y, H, h, KH, SH, PH, ADAPTIVE)
        left, right, padded_columns = _bounds(x, W, w, KW, SW, PW, ADAPTIVE)
        count = _divisor(bottom - top, right - left, padded_rows, padded_columns, COUNT_PAD, DIVISOR)
        has = (y >= 0) & (y < h) & (top <= r) & (r < bottom) & (x >= 0) & (x < w) & (left <= q) & (q < right)
        value = tl.load(start[:, None] + ((y * w + x)[:, None] * C + c[None, :]), inside & has[:, None], 0.0)
        total += value * (1.0 / tl.where(has, count, 1.0))[:, None]
    tl.store(d_x + first * C + (tl.arange(0, BM)[:, None] * C + c[None, :]), total, inside)

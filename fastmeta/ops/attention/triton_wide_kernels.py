"""Triton kernels of attention's maps where registers do not hold operands whole: wide heads, and dropout.

They are those of ``triton_kernels.py`` and ``triton_tangent_kernels.py`` but for two things. Products over a head's
columns are sums over ``COLUMNS`` of them at a time, whose operands are read anew for every tile of the scores: so a
program holds its sums, one tile of the scores with what belongs to it, and no operand. And where there is a ``seed``
they apply dropout, whose factors every kernel forms again from it; without one, a build has no trace of it.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.core.triton_dot import operand, product
from fastmeta.ops.attention.triton_kernels import INTEGERS, load, masked, start, start_of_result, store


@triton.jit
def columns_of(base, index, stride, rows, first, D: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows ``index`` of a head, ``[len(index), COLUMNS]``, from column ``first`` on; zero beyond rows and columns."""
    at = index * stride
    if ALIGNED:
        at = tl.multiple_of(at, 4)
    columns = first + tl.arange(0, COLUMNS)
    inside = index[:, None] < rows
    if D % COLUMNS:
        inside = inside & (columns[None, :] < D)
    return tl.load(base + at[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def both(
    a, a_dot, a_at, a_stride, a_rows, b, b_dot, b_at, b_stride, b_rows,
    A_DOT: tl.constexpr, B_DOT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    D: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``a b^T`` and its tangent, of rows ``a_at`` and ``b_at``; a loop at run time keeps no operand."""
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    total_dot = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(0, D, COLUMNS):
        a_tile = operand(columns_of(a, a_at, a_stride, a_rows, first, D, COLUMNS, ALIGNED), PRECISION)
        b_tile = operand(columns_of(b, b_at, b_stride, b_rows, first, D, COLUMNS, ALIGNED), PRECISION)
        total = product(a_tile, tl.trans(b_tile), total, PRECISION)
        if A_DOT:
            a_dot_tile = operand(columns_of(a_dot, a_at, a_stride, a_rows, first, D, COLUMNS, ALIGNED), PRECISION)
            total_dot = product(a_dot_tile, tl.trans(b_tile), total_dot, PRECISION)
        if B_DOT:
            b_dot_tile = operand(columns_of(b_dot, b_at, b_stride, b_rows, first, D, COLUMNS, ALIGNED), PRECISION)
            total_dot = product(a_tile, tl.trans(b_dot_tile), total_dot, PRECISION)
    return total, total_dot


@triton.jit
def weighted(
    weights, base, index, stride, rows, total,
    D: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``total + weights x`` for rows ``index`` of a head ``x``."""
    tile = operand(load(base, index, stride, rows, D, WIDTH, ALIGNED), PRECISION)
    return product(operand(weights, PRECISION), tile, total, PRECISION)


@triton.jit
def dropout(seed, share, factor, row, queries, keys):
    """Dropout's ``z`` of queries and keys that broadcast: ``factor`` for a ``share`` of them, else 0; 1 without a seed.

    A number depends on the seed and on the places of head, query and key, which are words of the generator's counter,
    and neither on the tile nor on the kernel. The seed is read for every tile: else the keys of ten rounds would stay
    in registers.
    """
    z = 1.0
    if seed is not None:
        word, _, _, _ = tl.philox(tl.load(seed, volatile=True), keys, queries, row, 0)
        z = tl.where(tl.uint_to_uniform_float(word) < share, factor, 0.0)
    return z


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    q, k, v, mask, o, peak, log_sum,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale, seed, share, factor,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    of_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_Q,), tl.float32)
    stop = S_k
    if CAUSAL:
        stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
    for first in range(0, stop, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        s, _ = both(
            q + of_q, q + of_q, queries, q_s, S_q, k + of_k, k + of_k, keys, k_s, S_k,
            False, False, BLOCK_Q, BLOCK_K, D, COLUMNS, ALIGNED, PRECISION,
        )  # fmt: skip
        s = masked(s * scale, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        larger = tl.maximum(largest, tl.max(s, 1))
        level = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp(s - level[:, None])
        fade = tl.exp(largest - level)
        norm = norm * fade + tl.sum(p, 1)
        total *= fade[:, None]
        p *= dropout(seed, share, factor, row, queries[:, None], keys[None, :])
        total = weighted(p, v + of_v, keys, v_s, S_k, total, D, WIDTH, ALIGNED, PRECISION)
        largest = larger
    attends = norm > 0
    norm = tl.where(attends, norm, 1.0)
    store(o + of_o, queries, heads * D, S_q, total / norm[:, None], D, WIDTH, ALIGNED)
    tl.store(peak + of_rows + queries, tl.where(attends, largest, float("inf")), mask=queries < S_q)
    tl.store(log_sum + of_rows + queries, tl.log(norm), mask=queries < S_q)


@triton.jit(do_not_specialize=INTEGERS)
def backward_queries(
    q, k, v, mask, o, peak, log_sum, d_o, delta, d_q,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale, seed, share, factor,
    WANTED: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    of_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d_o_tile = load(d_o + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    shift = tl.sum(d_o_tile * load(o + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED), 1)
    tl.store(delta + of_rows + queries, shift, mask=queries < S_q)
    if WANTED:
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        stop = S_k
        if CAUSAL:
            stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
        for first in range(0, stop, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            s, _ = both(
                q + of_q, q + of_q, queries, q_s, S_q, k + of_k, k + of_k, keys, k_s, S_k,
                False, False, BLOCK_Q, BLOCK_K, D, COLUMNS, ALIGNED, PRECISION,
            )  # fmt: skip
            s = masked(s * scale, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
            d_p, _ = both(
                d_o + of_o, d_o + of_o, queries, heads * D, S_q, v + of_v, v + of_v, keys, v_s, S_k,
                False, False, BLOCK_Q, BLOCK_K, D, COLUMNS, ALIGNED, PRECISION,
            )  # fmt: skip
            d_p *= dropout(seed, share, factor, row, queries[:, None], keys[None, :])
            d_s = tl.exp(s - level[:, None] - spread[:, None]) * (d_p - shift[:, None])
            total = weighted(d_s, k + of_k, keys, k_s, S_k, total, D, WIDTH, ALIGNED, PRECISION)
        store(d_q + of_o, queries, heads * D, S_q, total * scale, D, WIDTH, ALIGNED)


@triton.jit(do_not_specialize=INTEGERS)
def backward_keys(
    q, k, v, mask, peak, log_sum, d_o, delta, d_k, d_v,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale, seed, share, factor,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_k, BLOCK_K)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    of_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    total_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    total_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        begin = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    for first in range(begin, S_q, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        s, _ = both(
            k + of_k, k + of_k, keys, k_s, S_k, q + of_q, q + of_q, queries, q_s, S_q,
            False, False, BLOCK_K, BLOCK_Q, D, COLUMNS, ALIGNED, PRECISION,
        )  # fmt: skip
        s = masked(s * scale, mask, queries[None, :], keys[:, None], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        p = tl.exp(s - level[None, :] - spread[None, :])
        z = dropout(seed, share, factor, row, queries[None, :], keys[:, None])
        if WANT_V:
            total_v = weighted(p * z, d_o + of_o, queries, heads * D, S_q, total_v, D, WIDTH, ALIGNED, PRECISION)
        if WANT_K:
            shift = tl.load(delta + of_rows + queries, mask=queries < S_q, other=0.0)
            d_p, _ = both(
                v + of_v, v + of_v, keys, v_s, S_k, d_o + of_o, d_o + of_o, queries, heads * D, S_q,
                False, False, BLOCK_K, BLOCK_Q, D, COLUMNS, ALIGNED, PRECISION,
            )  # fmt: skip
            total_k = weighted(
                p * (d_p * z - shift[None, :]), q + of_q, queries, q_s, S_q, total_k, D, WIDTH, ALIGNED, PRECISION
            )
    of_result = start_of_result(row, heads, S_k, D, ALIGNED)
    if WANT_K:
        store(d_k + of_result, keys, heads * D, S_k, total_k * scale, D, WIDTH, ALIGNED)
    if WANT_V:
        store(d_v + of_result, keys, heads * D, S_k, total_v, D, WIDTH, ALIGNED)


@triton.jit(do_not_specialize=INTEGERS)
def tangent(
    q, k, v, mask, o, peak, log_sum, q_dot, k_dot, v_dot, o_dot, lse_dot,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale, seed, share, factor,
    Q_DOT: tl.constexpr, K_DOT: tl.constexpr, V_DOT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    of_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
    spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    drift = tl.zeros((BLOCK_Q,), tl.float32)
    stop = S_k
    if CAUSAL:
        stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
    for first in range(0, stop, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        s, s_dot = both(
            q + of_q, q_dot + of_q, queries, q_s, S_q, k + of_k, k_dot + of_k, keys, k_s, S_k,
            Q_DOT, K_DOT, BLOCK_Q, BLOCK_K, D, COLUMNS, ALIGNED, PRECISION,
        )  # fmt: skip
        s = masked(s * scale, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        p = tl.exp(s - level[:, None] - spread[:, None])
        z = dropout(seed, share, factor, row, queries[:, None], keys[None, :])
        if Q_DOT or K_DOT:
            p_s_dot = p * (s_dot * scale)
            drift += tl.sum(p_s_dot, 1)
            total = weighted(p_s_dot * z, v + of_v, keys, v_s, S_k, total, D, WIDTH, ALIGNED, PRECISION)
        if V_DOT:
            total = weighted(p * z, v_dot + of_v, keys, v_s, S_k, total, D, WIDTH, ALIGNED, PRECISION)
    o_tile = load(o + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    store(o_dot + of_o, queries, heads * D, S_q, total - drift[:, None] * o_tile, D, WIDTH, ALIGNED)
    tl.store(lse_dot + of_rows + queries, drift, mask=queries < S_q)


@triton.jit(do_not_specialize=INTEGERS)
def tangent_backward_queries(
    q, k, v, mask, o, peak, log_sum, d_o, q_dot, k_dot, v_dot, o_dot, lse_dot, d_o_dot, delta, delta_dot, d_q_dot,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale, seed, share, factor,
    WANTED: tl.constexpr, Q_DOT: tl.constexpr, K_DOT: tl.constexpr, V_DOT: tl.constexpr, D_O_DOT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    of_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d_o_tile = load(d_o + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    o_tile = load(o + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    shift = tl.sum(d_o_tile * o_tile, 1)
    shift_dot = tl.sum(d_o_tile * load(o_dot + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED), 1)
    if D_O_DOT:
        shift_dot += tl.sum(load(d_o_dot + of_o, queries, heads * D, S_q, D, WIDTH, ALIGNED) * o_tile, 1)
    tl.store(delta + of_rows + queries, shift, mask=queries < S_q)
    tl.store(delta_dot + of_rows + queries, shift_dot, mask=queries < S_q)
    if WANTED:
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        drift = tl.load(lse_dot + of_rows + queries, mask=queries < S_q, other=0.0)
        total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        stop = S_k
        if CAUSAL:
            stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
        for first in range(0, stop, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            s, s_dot = both(
                q + of_q, q_dot + of_q, queries, q_s, S_q, k + of_k, k_dot + of_k, keys, k_s, S_k,
                Q_DOT, K_DOT, BLOCK_Q, BLOCK_K, D, COLUMNS, ALIGNED, PRECISION,
            )  # fmt: skip
            s = masked(s * scale, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
            p = tl.exp(s - level[:, None] - spread[:, None])
            p_dot = p * (s_dot * scale - drift[:, None])
            d_p, d_p_dot = both(
                d_o + of_o, d_o_dot + of_o, queries, heads * D, S_q, v + of_v, v_dot + of_v, keys, v_s, S_k,
                D_O_DOT, V_DOT, BLOCK_Q, BLOCK_K, D, COLUMNS, ALIGNED, PRECISION,
            )  # fmt: skip
            z = dropout(seed, share, factor, row, queries[:, None], keys[None, :])
            centred = d_p * z - shift[:, None]
            d_s_dot = p_dot * centred + p * (d_p_dot * z - shift_dot[:, None])
            total = weighted(d_s_dot, k + of_k, keys, k_s, S_k, total, D, WIDTH, ALIGNED, PRECISION)
            if K_DOT:
                total = weighted(p * centred, k_dot + of_k, keys, k_s, S_k, total, D, WIDTH, ALIGNED, PRECISION)
        store(d_q_dot + of_o, queries, heads * D, S_q, total * scale, D, WIDTH, ALIGNED)


@triton.jit(do_not_specialize=INTEGERS)
def tangent_backward_keys(
    q, k, v, mask, peak, log_sum, d_o, q_dot, k_dot, v_dot, lse_dot, d_o_dot, delta, delta_dot, d_k_dot, d_v_dot,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale, seed, share, factor,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    Q_DOT: tl.constexpr, K_DOT: tl.constexpr, V_DOT: tl.constexpr, D_O_DOT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_k, BLOCK_K)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    of_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    total_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    total_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        begin = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    for first in range(begin, S_q, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        drift = tl.load(lse_dot + of_rows + queries, mask=queries < S_q, other=0.0)
        s, s_dot = both(
            k + of_k, k_dot + of_k, keys, k_s, S_k, q + of_q, q_dot + of_q, queries, q_s, S_q,
            K_DOT, Q_DOT, BLOCK_K, BLOCK_Q, D, COLUMNS, ALIGNED, PRECISION,
        )  # fmt: skip
        s = masked(s * scale, mask, queries[None, :], keys[:, None], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        p = tl.exp(s - level[None, :] - spread[None, :])
        p_dot = p * (s_dot * scale - drift[None, :])
        z = dropout(seed, share, factor, row, queries[None, :], keys[:, None])
        if WANT_V:
            if Q_DOT or K_DOT:
                total_v = weighted(
                    p_dot * z, d_o + of_o, queries, heads * D, S_q, total_v, D, WIDTH, ALIGNED, PRECISION
                )
            if D_O_DOT:
                total_v = weighted(
                    p * z, d_o_dot + of_o, queries, heads * D, S_q, total_v, D, WIDTH, ALIGNED, PRECISION
                )
        if WANT_K:
            shift = tl.load(delta + of_rows + queries, mask=queries < S_q, other=0.0)
            shift_dot = tl.load(delta_dot + of_rows + queries, mask=queries < S_q, other=0.0)
            d_p, d_p_dot = both(
                v + of_v, v_dot + of_v, keys, v_s, S_k, d_o + of_o, d_o_dot + of_o, queries, heads * D, S_q,
                V_DOT, D_O_DOT, BLOCK_K, BLOCK_Q, D, COLUMNS, ALIGNED, PRECISION,
            )  # fmt: skip
            centred = d_p * z - shift[None, :]
            d_s_dot = p_dot * centred + p * (d_p_dot * z - shift_dot[None, :])
            total_k = weighted(d_s_dot, q + of_q, queries, q_s, S_q, total_k, D, WIDTH, ALIGNED, PRECISION)
            if Q_DOT:
                total_k = weighted(p * centred, q_dot + of_q, queries, q_s, S_q, total_k, D, WIDTH, ALIGNED, PRECISION)
    of_result = start_of_result(row, heads, S_k, D, ALIGNED)
    if WANT_K:
        store(d_k_dot + of_result, keys, heads * D, S_k, total_k * scale, D, WIDTH, ALIGNED)
    if WANT_V:
        store(d_v_dot + of_result, keys, heads * D, S_k, total_v, D, WIDTH, ALIGNED)

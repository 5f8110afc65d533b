"""Triton kernels of attention's forward and backward, and what all of its kernels share.

A program owns one block of queries, or one of keys, of one head, and meets the other side block by block, so that no
sum crosses programs. Names and equations are those of ``reference.py``. Queries, keys and values are read by their
strides (``q_t``, ``q_b``, ``q_h``, ``q_s`` over tasks, batch, heads and rows; the last axis is dense), and so are
masks; tangents share the strides of their primals. Results and cotangents of results lie heads last,
``[T, B, S, H, D]`` in memory, as the projections around an attention have them.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.core.triton_dot import alone, operand, product

# Builds depend on none of these, so that a model of new lengths finds its kernels compiled.
STRIDES = (*(f"{x}_{axis}" for x in "qkv" for axis in "tbhs"), "m_t", "m_b", "m_h", "m_q", "m_k")
INTEGERS = (*STRIDES, "batch", "heads", "S_q", "S_k")


@triton.jit
def start(row, batch, heads, s_t, s_b, s_h, ALIGNED: tl.constexpr):
    """Where head ``row`` of all tasks' heads begins, by strides; 64 bits wide, as tasks may lie far apart."""
    row = row.to(tl.int64)
    entry = row // heads
    at = (entry // batch) * s_t + (entry % batch) * s_b + (row % heads) * s_h
    if ALIGNED:
        at = tl.multiple_of(at, 4)
    return at


@triton.jit
def start_of_result(row, heads, rows, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Where head ``row`` begins in a tensor that lies heads last."""
    row = row.to(tl.int64)
    at = ((row // heads) * rows * heads + row % heads) * D
    if ALIGNED:
        at = tl.multiple_of(at, 4)
    return at


@triton.jit
def load(base, index, stride, rows, D: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows ``index`` of a head, ``[len(index), WIDTH]``, zero beyond its ``rows`` and its ``D`` columns."""
    at = index * stride
    if ALIGNED:
        at = tl.multiple_of(at, 4)
    columns = tl.arange(0, WIDTH)
    inside = index[:, None] < rows
    if D < WIDTH:
        inside = inside & (columns[None, :] < D)
    return tl.load(base + at[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store(base, index, stride, rows, value, D: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    at = index * stride
    if ALIGNED:
        at = tl.multiple_of(at, 4)
    columns = tl.arange(0, WIDTH)
    inside = index[:, None] < rows
    if D < WIDTH:
        inside = inside & (columns[None, :] < D)
    tl.store(base + at[:, None] + columns[None, :], value, mask=inside)


@triton.jit
def masked(s, mask, queries, keys, m_q, m_k, S_q, S_k, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Scores with the mask, ``-inf`` where a query must not attend; ``queries`` and ``keys`` broadcast to ``s``."""
    inside = keys < S_k
    if MASK != "none":
        at = mask + queries.to(tl.int64) * m_q + keys.to(tl.int64) * m_k
        readable = inside & (queries < S_q)
        if MASK == "boolean":
            inside = tl.load(at, mask=readable, other=0) != 0
        else:
            s += tl.load(at, mask=readable, other=0.0)
    if CAUSAL:
        inside = inside & (keys <= queries)
    return tl.where(inside, s, float("-inf"))


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    q, k, v, mask, o, peak, log_sum,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    q += start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    k += start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    v += start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    o += start_of_result(row, heads, S_q, D, ALIGNED)
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_tile = operand(load(q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    norm = tl.zeros((BLOCK_Q,), tl.float32)
    stop = S_k
    if CAUSAL:
        stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
    for first in range(0, stop, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        k_tile = operand(load(k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
        s = alone(q_tile, tl.trans(k_tile), PRECISION) * scale
        s = masked(s, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        larger = tl.maximum(largest, tl.max(s, 1))
        level = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.exp(s - level[:, None])
        fade = tl.exp(largest - level)
        norm = norm * fade + tl.sum(p, 1)
        v_tile = operand(load(v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
        total = product(operand(p, PRECISION), v_tile, total * fade[:, None], PRECISION)
        largest = larger
    attends = norm > 0
    norm = tl.where(attends, norm, 1.0)
    store(o, queries, heads * D, S_q, total / norm[:, None], D, WIDTH, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    tl.store(peak + of_rows + queries, tl.where(attends, largest, float("inf")), mask=queries < S_q)
    tl.store(log_sum + of_rows + queries, tl.log(norm), mask=queries < S_q)


@triton.jit(do_not_specialize=INTEGERS)
def backward_queries(
    q, k, v, mask, o, peak, log_sum, d_o, delta, d_q,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale,
    WANTED: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_result = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d_o_tile = load(d_o + of_result, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    shift = tl.sum(d_o_tile * load(o + of_result, queries, heads * D, S_q, D, WIDTH, ALIGNED), 1)
    tl.store(delta + of_rows + queries, shift, mask=queries < S_q)
    if WANTED:
        k += start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
        v += start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
        if MASK != "none":
            mask += start(row, batch, heads, m_t, m_b, m_h, False)
        at = q + start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
        q_tile = operand(load(at, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
        d_o_tile = operand(d_o_tile, PRECISION)
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        stop = S_k
        if CAUSAL:
            stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
        for first in range(0, stop, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            k_tile = operand(load(k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            v_tile = operand(load(v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            s = alone(q_tile, tl.trans(k_tile), PRECISION) * scale
            s = masked(s, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
            d_p = alone(d_o_tile, tl.trans(v_tile), PRECISION)
            d_s = tl.exp(s - level[:, None] - spread[:, None]) * (d_p - shift[:, None])
            total = product(operand(d_s, PRECISION), k_tile, total, PRECISION)
        store(d_q + of_result, queries, heads * D, S_q, total * scale, D, WIDTH, ALIGNED)


@triton.jit(do_not_specialize=INTEGERS)
def backward_keys(
    q, k, v, mask, peak, log_sum, d_o, delta, d_k, d_v,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_k, BLOCK_K)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    q += start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    k += start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    v += start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    d_o += start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = operand(load(k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
    v_tile = operand(load(v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
    total_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    total_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        begin = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    for first in range(begin, S_q, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        q_tile = operand(load(q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
        d_o_tile = operand(load(d_o, queries, heads * D, S_q, D, WIDTH, ALIGNED), PRECISION)
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        s = alone(k_tile, tl.trans(q_tile), PRECISION) * scale
        s = masked(s, mask, queries[None, :], keys[:, None], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        p = tl.exp(s - level[None, :] - spread[None, :])
        if WANT_V:
            total_v = product(operand(p, PRECISION), d_o_tile, total_v, PRECISION)
        if WANT_K:
            shift = tl.load(delta + of_rows + queries, mask=queries < S_q, other=0.0)
            d_p = alone(v_tile, tl.trans(d_o_tile), PRECISION)
            d_s = p * (d_p - shift[None, :])
            total_k = product(operand(d_s, PRECISION), q_tile, total_k, PRECISION)
    of_result = start_of_result(row, heads, S_k, D, ALIGNED)
    if WANT_K:
        store(d_k + of_result, keys, heads * D, S_k, total_k * scale, D, WIDTH, ALIGNED)
    if WANT_V:
        store(d_v + of_result, keys, heads * D, S_k, total_v, D, WIDTH, ALIGNED)

"""Triton kernels of attention's tangent and tangent-backward: one pass each, as every row sum is known beforehand.

The softmax's tangent needs a sum over keys before it can be formed, ``P_dot = P (S_dot - rowsum(P S_dot))``. That sum
is the tangent of the row's logsumexp, which the tangent map leaves; the sum in the backward's tangent,
``rowsum(P_dot d_P + P d_P_dot)``, equals ``rowsum(d_o_dot o + d_o o_dot)``, which no loop over keys is needed for.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from fastmeta.core.triton_dot import alone, onto, operand, product
from fastmeta.ops.attention.triton_kernels import (
    INTEGERS,
    load,
    masked,
    start,
    start_of_result,
    store,
)


@triton.jit(do_not_specialize=INTEGERS)
def tangent(
    q, k, v, mask, o, peak, log_sum, q_dot, k_dot, v_dot, o_dot, lse_dot,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale,
    Q_DOT: tl.constexpr, K_DOT: tl.constexpr, V_DOT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_q, BLOCK_Q)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    of_rows = row.to(tl.int64) * S_q
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
    spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
    q_tile = operand(load(q + of_q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
    if Q_DOT:
        q_dot_tile = operand(load(q_dot + of_q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
    zeros = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    drift = tl.zeros((BLOCK_Q,), tl.float32)
    stop = S_k
    if CAUSAL:
        stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
    for first in range(0, stop, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        k_tile = operand(load(k + of_k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
        s = alone(q_tile, tl.trans(k_tile), PRECISION) * scale
        s = masked(s, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        p = tl.exp(s - level[:, None] - spread[:, None])
        if Q_DOT or K_DOT:
            s_dot = zeros
            if Q_DOT:
                s_dot = alone(q_dot_tile, tl.trans(k_tile), PRECISION)
            if K_DOT:
                k_dot_tile = operand(load(k_dot + of_k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
                s_dot = onto(q_tile, tl.trans(k_dot_tile), s_dot, Q_DOT, PRECISION)
            weighted = p * (s_dot * scale)
            drift += tl.sum(weighted, 1)
            v_tile = operand(load(v + of_v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            total = product(operand(weighted, PRECISION), v_tile, total, PRECISION)
        if V_DOT:
            v_dot_tile = operand(load(v_dot + of_v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            total = product(operand(p, PRECISION), v_dot_tile, total, PRECISION)
    of_result = start_of_result(row, heads, S_q, D, ALIGNED)
    o_tile = load(o + of_result, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    store(o_dot + of_result, queries, heads * D, S_q, total - drift[:, None] * o_tile, D, WIDTH, ALIGNED)
    tl.store(lse_dot + of_rows + queries, drift, mask=queries < S_q)


@triton.jit(do_not_specialize=INTEGERS)
def tangent_backward_queries(
    q, k, v, mask, o, peak, log_sum, d_o, q_dot, k_dot, v_dot, o_dot, lse_dot, d_o_dot, delta, delta_dot, d_q_dot,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale,
    WANTED: tl.constexpr, Q_DOT: tl.constexpr, K_DOT: tl.constexpr, V_DOT: tl.constexpr, D_O_DOT: tl.constexpr,
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
    o_tile = load(o + of_result, queries, heads * D, S_q, D, WIDTH, ALIGNED)
    shift = tl.sum(d_o_tile * o_tile, 1)
    shift_dot = tl.sum(d_o_tile * load(o_dot + of_result, queries, heads * D, S_q, D, WIDTH, ALIGNED), 1)
    if D_O_DOT:
        d_o_dot_tile = load(d_o_dot + of_result, queries, heads * D, S_q, D, WIDTH, ALIGNED)
        shift_dot += tl.sum(d_o_dot_tile * o_tile, 1)
    tl.store(delta + of_rows + queries, shift, mask=queries < S_q)
    tl.store(delta_dot + of_rows + queries, shift_dot, mask=queries < S_q)
    if WANTED:
        of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
        of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
        of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
        if MASK != "none":
            mask += start(row, batch, heads, m_t, m_b, m_h, False)
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        drift = tl.load(lse_dot + of_rows + queries, mask=queries < S_q, other=0.0)
        q_tile = operand(load(q + of_q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
        if Q_DOT:
            q_dot_tile = operand(load(q_dot + of_q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
        d_o_tile = operand(d_o_tile, PRECISION)
        if D_O_DOT:
            d_o_dot_tile = operand(d_o_dot_tile, PRECISION)
        zeros = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        total = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
        stop = S_k
        if CAUSAL:
            stop = tl.minimum(S_k, (block + 1) * BLOCK_Q)
        for first in range(0, stop, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            k_tile = operand(load(k + of_k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            if K_DOT:
                k_dot_tile = operand(load(k_dot + of_k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            s = alone(q_tile, tl.trans(k_tile), PRECISION) * scale
            s = masked(s, mask, queries[:, None], keys[None, :], m_q, m_k, S_q, S_k, MASK, CAUSAL)
            p = tl.exp(s - level[:, None] - spread[:, None])
            p_dot = zeros
            if Q_DOT or K_DOT:
                s_dot = zeros
                if Q_DOT:
                    s_dot = alone(q_dot_tile, tl.trans(k_tile), PRECISION)
                if K_DOT:
                    s_dot = onto(q_tile, tl.trans(k_dot_tile), s_dot, Q_DOT, PRECISION)
                p_dot = p * (s_dot * scale - drift[:, None])
            v_tile = operand(load(v + of_v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
            centred = alone(d_o_tile, tl.trans(v_tile), PRECISION) - shift[:, None]
            centred_dot = zeros
            if D_O_DOT:
                centred_dot = alone(d_o_dot_tile, tl.trans(v_tile), PRECISION)
            if V_DOT:
                v_dot_tile = operand(load(v_dot + of_v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
                centred_dot = onto(d_o_tile, tl.trans(v_dot_tile), centred_dot, D_O_DOT, PRECISION)
            d_s_dot = p_dot * centred + p * (centred_dot - shift_dot[:, None])
            part = alone(operand(d_s_dot, PRECISION), k_tile, PRECISION)
            if K_DOT:
                part = onto(operand(p * centred, PRECISION), k_dot_tile, part, True, PRECISION)
            total += part
        store(d_q_dot + of_result, queries, heads * D, S_q, total * scale, D, WIDTH, ALIGNED)


@triton.jit(do_not_specialize=INTEGERS)
def tangent_backward_keys(
    q, k, v, mask, peak, log_sum, d_o, q_dot, k_dot, v_dot, lse_dot, d_o_dot, delta, delta_dot, d_k_dot, d_v_dot,
    q_t, q_b, q_h, q_s, k_t, k_b, k_h, k_s, v_t, v_b, v_h, v_s, m_t, m_b, m_h, m_q, m_k,
    batch, heads, S_q, S_k, scale,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    Q_DOT: tl.constexpr, K_DOT: tl.constexpr, V_DOT: tl.constexpr, D_O_DOT: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S_k, BLOCK_K)
    block = tl.program_id(0) % blocks
    row = tl.program_id(0) // blocks
    of_q = start(row, batch, heads, q_t, q_b, q_h, ALIGNED)
    of_k = start(row, batch, heads, k_t, k_b, k_h, ALIGNED)
    of_v = start(row, batch, heads, v_t, v_b, v_h, ALIGNED)
    if MASK != "none":
        mask += start(row, batch, heads, m_t, m_b, m_h, False)
    of_d_o = start_of_result(row, heads, S_q, D, ALIGNED)
    of_rows = row.to(tl.int64) * S_q
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = operand(load(k + of_k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
    v_tile = operand(load(v + of_v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
    if K_DOT:
        k_dot_tile = operand(load(k_dot + of_k, keys, k_s, S_k, D, WIDTH, ALIGNED), PRECISION)
    if V_DOT:
        v_dot_tile = operand(load(v_dot + of_v, keys, v_s, S_k, D, WIDTH, ALIGNED), PRECISION)
    zeros = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    total_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    total_v = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    begin = 0
    if CAUSAL:
        begin = block * BLOCK_K // BLOCK_Q * BLOCK_Q
    for first in range(begin, S_q, BLOCK_Q):
        queries = first + tl.arange(0, BLOCK_Q)
        q_tile = operand(load(q + of_q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
        d_o_tile = operand(load(d_o + of_d_o, queries, heads * D, S_q, D, WIDTH, ALIGNED), PRECISION)
        level = tl.load(peak + of_rows + queries, mask=queries < S_q, other=float("inf"))
        spread = tl.load(log_sum + of_rows + queries, mask=queries < S_q, other=0.0)
        s = alone(k_tile, tl.trans(q_tile), PRECISION) * scale
        s = masked(s, mask, queries[None, :], keys[:, None], m_q, m_k, S_q, S_k, MASK, CAUSAL)
        p = tl.exp(s - level[None, :] - spread[None, :])
        p_dot = zeros
        if Q_DOT or K_DOT:
            s_dot = zeros
            if Q_DOT:
                q_dot_tile = operand(load(q_dot + of_q, queries, q_s, S_q, D, WIDTH, ALIGNED), PRECISION)
                s_dot = alone(k_tile, tl.trans(q_dot_tile), PRECISION)
            if K_DOT:
                s_dot = onto(k_dot_tile, tl.trans(q_tile), s_dot, Q_DOT, PRECISION)
            drift = tl.load(lse_dot + of_rows + queries, mask=queries < S_q, other=0.0)
            p_dot = p * (s_dot * scale - drift[None, :])
        if D_O_DOT:
            d_o_dot_tile = operand(load(d_o_dot + of_d_o, queries, heads * D, S_q, D, WIDTH, ALIGNED), PRECISION)
        if WANT_V:
            part = tl.zeros((BLOCK_K, WIDTH), tl.float32)
            if Q_DOT or K_DOT:
                part = alone(operand(p_dot, PRECISION), d_o_tile, PRECISION)
            if D_O_DOT:
                part = onto(operand(p, PRECISION), d_o_dot_tile, part, Q_DOT or K_DOT, PRECISION)
            total_v += part
        if WANT_K:
            shift = tl.load(delta + of_rows + queries, mask=queries < S_q, other=0.0)
            shift_dot = tl.load(delta_dot + of_rows + queries, mask=queries < S_q, other=0.0)
            centred = alone(v_tile, tl.trans(d_o_tile), PRECISION) - shift[None, :]
            centred_dot = zeros
            if D_O_DOT:
                centred_dot = alone(v_tile, tl.trans(d_o_dot_tile), PRECISION)
            if V_DOT:
                centred_dot = onto(v_dot_tile, tl.trans(d_o_tile), centred_dot, D_O_DOT, PRECISION)
            d_s_dot = p_dot * centred + p * (centred_dot - shift_dot[None, :])
            part = alone(operand(d_s_dot, PRECISION), q_tile, PRECISION)
            if Q_DOT:
                part = onto(operand(p * centred, PRECISION), q_dot_tile, part, True, PRECISION)
            total_k += part
    of_result = start_of_result(row, heads, S_k, D, ALIGNED)
    if WANT_K:
        store(d_k_dot + of_result, keys, heads * D, S_k, total_k * scale, D, WIDTH, ALIGNED)
    if WANT_V:
        store(d_v_dot + of_result, keys, heads * D, S_k, total_v, D, WIDTH, ALIGNED)

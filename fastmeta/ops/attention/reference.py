"""Scaled dot-product attention: the four maps of docs/maths.md, section 2, from the results that a forward saves.

With ``S = c q k^T + mask`` over the keys of each query, ``l = logsumexp S``, ``P = exp(S - l)`` and ``o = P v``::

    backward           d_v = P^T d_o,  d_S = P (d_o v^T - delta),  d_q = c d_S k,  d_k = c d_S^T q
    tangent            l_dot = rowsum(P S_dot),  o_dot = (P S_dot) v + P v_dot - l_dot o
    tangent_backward   the tangents of the backward's products, with P_dot = P (S_dot - l_dot)

where ``delta = rowsum(d_o o) = rowsum(P (d_o v^T))``. What is kept of ``l`` are its two parts, the largest of ``S`` and
the logarithm of ``sum exp(S - peak)``: where a mask adds the least finite number to every score of a query, their sum
would lose the second. A query that attends to nothing has ``peak = inf``, so that ``P`` and the result are zero, as in
PyTorch.

Dropout draws ``z`` in the forward map, of each weight: ``1 / (1 - p)`` with probability ``1 - p``, else 0. What
multiplies ``v``, ``v_dot``, ``d_o`` and ``d_o_dot`` above is then ``z P``, ``z (P S_dot)`` or ``z P_dot``, and
``z (d_o v^T)`` stands for ``d_o v^T``; ``l``, ``l_dot`` and ``delta = rowsum(d_o o)`` stay.

Shapes: ``q`` ``[T, B, H, S_q, D]``, ``k`` ``[T, B, H, S_k, D]``, ``v`` ``[T, B, H, S_k, D_v]``, ``o`` as ``q`` with
``D_v``, ``peak``, ``log_sum`` and ``lse_dot`` (``l_dot``) ``[T, B, H, S_q]``, ``mask`` ``[T, B, H, S_q, S_k]``: boolean
(``False`` attends not) or added; ``z`` as ``mask``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Setting(NamedTuple):
    """What a call fixes: the factor ``c`` of the products, whether a query attends to no later key, dropout's ``p``."""

    scale: float
    causal: bool
    dropout: float = 0.0


class Saved(NamedTuple):
    """What the forward map leaves for the others; the shapes are those of the module.

    ``drawn`` is dropout's ``z`` or, where kernels run, the seed ``[1]`` that they form it from; ``None`` without it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    o: Tensor
    peak: Tensor
    log_sum: Tensor
    drawn: Tensor | None = None


class SavedDot(NamedTuple):
    """The tangents that the tangent map leaves for the tangent-backward; ``None`` is zero."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    o: Tensor
    lse: Tensor


Need = tuple[bool, bool, bool]  # of d_q, d_k, d_v
Cotangents = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Saved:
    """``o``, ``peak``, ``log_sum`` and dropout's ``z``, drawn from PyTorch's generator, beside the operands."""
    scores = _scores(q, k, mask, setting)
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, torch.inf, peak)
    p = torch.exp(scores - peak)
    total = p.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    z = _draw(scores, setting.dropout) if setting.dropout else None
    o = torch.matmul(_dropped(p / total, z), v)
    return Saved(q, k, v, mask, o, peak.squeeze(-1), total.log().squeeze(-1), z)


def backward(saved: Saved, d_o: Tensor, setting: Setting, need: Need) -> Cotangents:
    """``d_q``, ``d_k``, ``d_v``."""
    q, k, v, _, o, *_, z = saved
    p = _probabilities(saved, setting)
    d_s = p * (_dropped(torch.matmul(d_o, v.mT), z) - _rowsum(d_o, o)) * setting.scale
    d_q = torch.matmul(d_s, k) if need[0] else None
    d_k = torch.matmul(d_s.mT, q) if need[1] else None
    return d_q, d_k, torch.matmul(_dropped(p, z).mT, d_o) if need[2] else None


def tangent(
    saved: Saved, q_dot: Tensor | None, k_dot: Tensor | None, v_dot: Tensor | None, setting: Setting
) -> SavedDot:
    """``o_dot`` and ``lse_dot`` beside the operands' tangents, of which ``None`` is zero."""
    p = _probabilities(saved, setting)
    s_dot = _scores_dot(saved, q_dot, k_dot, setting)
    if s_dot is None:
        lse_dot, o_dot = torch.zeros_like(saved.peak), torch.zeros_like(saved.o)
    else:
        weighted = p * s_dot
        lse_dot = weighted.sum(-1)
        o_dot = torch.matmul(_dropped(weighted, saved.drawn), saved.v) - lse_dot.unsqueeze(-1) * saved.o
    if v_dot is not None:
        o_dot = o_dot + torch.matmul(_dropped(p, saved.drawn), v_dot)
    return SavedDot(q_dot, k_dot, v_dot, o_dot, lse_dot)


def tangent_backward(
    saved: Saved, dot: SavedDot, d_o: Tensor, d_o_dot: Tensor | None, setting: Setting, need: Need
) -> Cotangents:
    """The tangents of ``d_q``, ``d_k``, ``d_v``; ``None`` for ``d_o_dot`` is zero."""
    q, k, v, _, o, *_, z = saved
    c = setting.scale
    p = _probabilities(saved, setting)
    s_dot = _scores_dot(saved, dot.q, dot.k, setting)
    p_dot = torch.zeros_like(p) if s_dot is None else p * (s_dot - dot.lse.unsqueeze(-1))
    centred = _dropped(torch.matmul(d_o, v.mT), z) - _rowsum(d_o, o)
    centred_dot = -_rowsum(d_o, dot.o)
    if d_o_dot is not None:
        centred_dot = centred_dot + _dropped(torch.matmul(d_o_dot, v.mT), z) - _rowsum(d_o_dot, o)
    if dot.v is not None:
        centred_dot = centred_dot + _dropped(torch.matmul(d_o, dot.v.mT), z)
    d_s, d_s_dot = p * centred, p_dot * centred + p * centred_dot
    d_q_dot = d_k_dot = d_v_dot = None
    if need[0]:
        d_q_dot = c * _plus(torch.matmul(d_s_dot, k), d_s, dot.k)
    if need[1]:
        d_k_dot = c * _plus(torch.matmul(d_s_dot.mT, q), d_s.mT, dot.q)
    if need[2]:
        d_v_dot = _plus(torch.matmul(_dropped(p_dot, z).mT, d_o), _dropped(p, z).mT, d_o_dot)
    return d_q_dot, d_k_dot, d_v_dot


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """``S``, ``[T, B, H, S_q, S_k]``, ``-inf`` where a query must not attend."""
    scores = torch.matmul(q, k.mT) * setting.scale
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if setting.causal:
        earlier = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = torch.where(earlier, scores, -torch.inf)
    return scores


def _draw(scores: Tensor, p: float) -> Tensor:
    """``z``, like ``scores``: ``1 / (1 - p)`` with probability ``1 - p``, else 0."""
    if p == 1:
        return torch.zeros_like(scores)
    return torch.empty_like(scores).bernoulli_(1 - p).div_(1 - p)


def _dropped(value: Tensor, z: Tensor | None) -> Tensor:
    return value if z is None else z * value


def _probabilities(saved: Saved, setting: Setting) -> Tensor:
    scores = _scores(saved.q, saved.k, saved.mask, setting)
    return torch.exp(scores - saved.peak.unsqueeze(-1) - saved.log_sum.unsqueeze(-1))


def _scores_dot(saved: Saved, q_dot: Tensor | None, k_dot: Tensor | None, setting: Setting) -> Tensor | None:
    if q_dot is None:
        return None if k_dot is None else torch.matmul(saved.q, k_dot.mT) * setting.scale
    return _plus(torch.matmul(q_dot, saved.k.mT), saved.q, None if k_dot is None else k_dot.mT) * setting.scale


def _rowsum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _plus(value: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``value + left right``, where ``None`` is zero."""
    return value if right is None else value + torch.matmul(left, right)

"""Softmax cross-entropy with class labels: the four maps of docs/maths.md, section 2.

With ``p = softmax z``, label ``y``, class weights ``w`` and label smoothing ``e``, the loss of a row is
``-sum_c q_c log p_c`` with ``q_c = m ((1 - e) w_y [c = y] + (e / C) w_c)``, where the mask ``m`` is zero for an ignored
label. The mean divides by ``D``, the sum of ``m w_y``; ``s = 1 / D``, or one for the sum and for the unreduced loss.

    forward           l       = s sum_n -q . log p
    backward          d_z     = d_l g                        g = s (r p - q),  r = sum_c q_c
    tangent           l_dot   = sum_n g . z_dot              p_dot = p (z_dot - p . z_dot)
    tangent_backward  d_z_dot = d_l_dot g + d_l s r p_dot

Shapes: ``z`` and its like ``[T, R, C]`` with ``R`` rows a task; labels ``[T, R]``; the loss ``[T]``, unreduced
``[T, R]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NONE, MEAN, SUM = 0, 1, 2  # ATen's reductions


class Kept(NamedTuple):
    """What the other maps need: ``g``, ``p``, both ``[T, R, C]``, and ``s r``, which broadcasts to them."""

    g: Tensor
    p: Tensor
    sr: Tensor


def forward(
    z: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: int,
    smoothing: float,
) -> tuple[Tensor, Kept]:
    """Loss and what is kept.

    Args:
        z: logits, ``[T, R, C]``.
        labels: in ``[0, C)``, ``[T, R]``; where ``mask`` is false, any such value.
        mask: rows that count, ``[T, R]``, or ``None`` for all.
        weight: of the classes, ``[T, C]``.
        reduction: ``NONE``, ``MEAN`` or ``SUM``.
        smoothing: in ``[0, 1]``.
    """
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    index = labels.unsqueeze(-1)
    if mask is None and weight is None and smoothing == 0:
        loss = log_p.gather(-1, index).squeeze(-1).neg_()
        s = 1.0 / z.shape[1] if reduction == MEAN else 1.0
        g = (p if s == 1 else p * s).scatter_add(-1, index, z.new_full((), -s).expand(index.shape))
        return reduced(loss, reduction), Kept(g, p, z.new_full((1, 1, 1), s))
    q, row = distribution(log_p, index, mask, weight, smoothing)
    loss = -(q * log_p).sum(-1)
    r = q.sum(-1, keepdim=True)
    if reduction == MEAN:
        inverse = row.sum(1).reciprocal()
        loss = loss.sum(1) * inverse
        q, r = q * inverse.view(-1, 1, 1), r * inverse.view(-1, 1, 1)
    elif reduction == SUM:
        loss = loss.sum(1)
    return loss, Kept(r * p - q, p, r)


def distribution(
    log_p: Tensor, index: Tensor, mask: Tensor | None, weight: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """``q``, ``[T, R, C]``, and ``m w_y``, ``[T, R]``."""
    tasks, rows, classes = log_p.shape
    w = log_p.new_ones(()) if weight is None else weight.unsqueeze(1)
    row = w.expand(tasks, rows, classes).gather(-1, index)
    if mask is not None:
        row = row * mask.unsqueeze(-1)
    q = torch.zeros_like(log_p).scatter_(-1, index, row * (1 - smoothing))
    if smoothing:
        smooth = w * (smoothing / classes)
        q = q + (smooth if mask is None else smooth * mask.unsqueeze(-1))
    return q, row.squeeze(-1)


def reduced(rows: Tensor, reduction: int) -> Tensor:
    """Rows' values reduced as the loss is."""
    if reduction == NONE:
        return rows
    return rows.mean(1) if reduction == MEAN else rows.sum(1)


def backward(kept: Kept, d_l: Tensor) -> Tensor:
    """``d_z = d_l g``."""
    return kept.g * spread(d_l)


def tangent(kept: Kept, z_dot: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """``l_dot`` and ``s r p_dot``."""
    product = kept.g * z_dot
    p_dot = torch._softmax_backward_data(z_dot, kept.p, -1, kept.p.dtype)
    return product.sum(-1) if reduction == NONE else product.sum((1, 2)), p_dot * kept.sr


def tangent_backward(kept: Kept, srp_dot: Tensor | None, d_l: Tensor | None, d_l_dot: Tensor | None) -> Tensor | None:
    """``d_z_dot = d_l_dot g + d_l s r p_dot``."""
    straight = None if d_l_dot is None else backward(kept, d_l_dot)
    if d_l is None or srp_dot is None:
        return straight
    return srp_dot * spread(d_l) if straight is None else straight.addcmul_(srp_dot, spread(d_l))


def spread(d_l: Tensor) -> Tensor:
    """``[T]`` or ``[T, R]`` as ``[T, R or 1, 1]``."""
    return d_l.view(-1, 1, 1) if d_l.dim() == 1 else d_l.unsqueeze(-1)

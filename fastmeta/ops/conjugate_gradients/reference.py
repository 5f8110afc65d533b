"""An iteration of conjugate gradients for ``A v = b`` of every task, ``A = B + s``, eq. (25) of docs/maths.md.

    q = B p + s p       c = <p, q>        a = <r, r> / c
    v += a p            r -= a q          p = r + (<r', r'> / <r, r>) p

A task ends where ``<r, r>`` is small enough, or ``c`` is not positive; it then keeps what it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.ops.conjugate_gradients.state import State


def advance(state: State, product: Tensor, shift: float) -> None:
    """One iteration of every task that goes on.

    Args:
        state: before and after.
        product: ``B p``, ``[T, P]``.
        shift: ``s``.
    """
    q = torch.add(product, state.p, alpha=shift)
    curvature = (state.p * q).sum(1)
    state.positive = state.positive & ((curvature > 0) | ~state.active)
    on = state.active & (curvature > 0)
    length = torch.where(on, state.square / curvature, 0.0).unsqueeze(1)
    state.v, state.r = state.v + length * state.p, state.r - length * q
    after = (state.r * state.r).sum(1)
    state.p = torch.where(on.unsqueeze(1), state.r + (after / state.square).unsqueeze(1) * state.p, state.p)
    state.square = torch.where(on, after, state.square)
    state.iterations = state.iterations + on
    state.active = on & (state.square > state.enough)

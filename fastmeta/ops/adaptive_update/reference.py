"""An adaptive step and its adjoint in plain torch; the step is differentiable to any order, the truth in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmeta.core.optimizer_steps import root
from fastmeta.core.segments import collect, spread
from fastmeta.ops.adaptive_update.form import Adjoint, Coefficients, Form, State


def step(
    form: Form,
    phi: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    state: State,
    c: Coefficients,
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
) -> tuple[Tensor, State]:  # [T, P]
    """Eq. (19): the parameters and the state after the step."""
    f = _Forward(form, phi, g, _filled(state, g), c)
    return phi - spread(alpha, segments, g.shape[-1]) * f.along, _of(form, f.after)


def adjoint(
    form: Form,
    lam: Tensor,  # [T, P]
    d_after: State,
    phi: Tensor | None,  # [T, P]
    g: Tensor,  # [T, P]
    before: State,
    c: Coefficients,
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    need_numbers: bool = True,
) -> Adjoint:
    """Eq. (20) and, where they are wanted, the gradients to alpha and the coefficients, eq. (21)."""
    s, after = _filled(before, g), _filled(d_after, g)
    f = _Forward(form, g.new_zeros(()) if phi is None else phi, g, s, c)
    along = -(spread(alpha, segments, g.shape[-1]) * lam)
    buffer = after.buffer + along if form.buffer else along
    numerator = quotient(buffer, f.denominator)
    denominator = -(numerator * f.ratio)
    inside = quotient(denominator, 2 * f.root)
    second = largest = inside * c.of_second
    if form.largest:
        earlier, total = s.largest > f.after.second, after.largest + second
        largest, second = torch.where(earlier, total, 0.0), torch.where(earlier, 0.0, total)
    second = after.second + second
    first = after.first
    if form.averaged:
        first = first + numerator * c.of_first
    if form.centred:
        first = first - 2 * (f.after.first * inside)
    d = 2 * c.take_second * (f.d * second)
    if form.first:
        d = d + c.take_first * first
    if not form.averaged:
        d = d + numerator * c.of_first
    d_before = _of(form, (c.keep_first * first, c.keep_second * second, largest, c.momentum * buffer))
    d_phi = None if phi is None else lam + c.decay * d + c.shrink * along
    if not need_numbers:
        return Adjoint(d_phi, -d, d_before, None, None)
    theta = g.new_zeros(()) if phi is None else phi
    factors = (
        (theta, d),
        (s.first, first),
        (f.d, first),
        (s.second, second),
        (f.d * f.d, second),
        (f.divided, numerator),
        (f.after.largest, inside),
        (torch.ones_like(inside), inside),
        (torch.ones_like(inside), denominator),
        (s.buffer, buffer),
        (theta, along),
    )
    d_coefficients = torch.stack([(x * y).sum(dtype=torch.float64) for x, y in factors])
    return Adjoint(d_phi, -d, d_before, -collect(f.along, lam, alpha, segments), d_coefficients)


def quotient(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, and 0, with all its derivatives, where ``y`` is 0."""
    none = y == 0
    return torch.where(none, 0.0, x / torch.where(none, 1.0, y))


class _Moments(NamedTuple):
    """A :class:`State` with zeros, ``[]``, for what it has not."""

    first: Tensor
    second: Tensor
    largest: Tensor
    buffer: Tensor


class _Forward:
    """Eq. (19) and what is met on the way."""

    def __init__(self, form: Form, phi: Tensor, g: Tensor, s: _Moments, c: Coefficients) -> None:
        self.d = d = g + c.decay * phi
        first = c.keep_first * s.first + c.take_first * d if form.first else s.first
        second = c.keep_second * s.second + c.take_second * (d * d)
        largest = torch.where(s.largest > second, s.largest, second) if form.largest else second
        inside = largest * c.of_second
        if form.centred:
            inside = inside - first * first
        self.root = root(inside + c.eps_root)
        self.denominator = self.root + c.eps
        self.divided = first if form.averaged else d
        self.ratio = quotient(self.divided * c.of_first, self.denominator)
        buffer = c.momentum * s.buffer + self.ratio if form.buffer else self.ratio
        self.after = _Moments(first, second, largest, buffer)
        self.along = buffer + c.shrink * phi


def _filled(state: State, like: Tensor) -> _Moments:
    zero = like.new_zeros(())
    return _Moments(*(zero if part is None else part for part in state))


def _of(form: Form, moments: tuple[Tensor, ...]) -> State:
    return State(*(part if has else None for part, has in zip(moments, form.has, strict=True)))

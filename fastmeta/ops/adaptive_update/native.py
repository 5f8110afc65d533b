"""Calls of the C++ kernels: float32 and float64 on a CPU, not differentiable by themselves.

Rows may lie any distance apart, zero included; the elements of a row must be contiguous. The results do not depend on
the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.core import checks, native
from fastmeta.core.packed_rows import rate, read
from fastmeta.ops.adaptive_update.form import Adjoint, Coefficients, Form, State

OP = "adaptive_update"
NOWHERE = (0, 0)
Place = tuple[int, int]  # address and distance between rows


def step(
    form: Form,
    phi: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    state: State,
    c: Coefficients,
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
) -> tuple[Tensor, State]:  # [T, P]
    """Eq. (19) into new tensors."""
    extension = native.require(OP)
    places = _place("phi", phi, g), _place("g", g, g), _places("state", form, state, g)
    rates = rate(OP, alpha, segments, g.dtype)
    phi_after, after = _new(g), State(*(_new(g) if has else None for has in form.has))
    extension.adaptive_update_step(
        g.dtype is torch.float64,
        int(form),
        *g.shape,
        *places,
        [float(x) for x in c],
        *rates,
        _out(phi_after),
        [_out(x) for x in after],
        torch.get_num_threads(),
    )
    return phi_after, after


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
    extension = native.require(OP)
    places = _place("phi", phi, g), _place("g", g, g), _places("state", form, before, g)
    cotangents = _place("lam", lam, g), _places("d_after", form, d_after, g)
    rates = rate(OP, alpha, segments, g.dtype)
    u, d_phi = _new(g), None if phi is None else _new(g)
    d_before = State(*(_new(g) if has else None for has in form.has))
    d_alpha = torch.empty_like(alpha) if need_numbers else None
    d_coefficients = torch.empty(len(c), dtype=torch.float64) if need_numbers else None
    extension.adaptive_update_adjoint(
        g.dtype is torch.float64,
        int(form),
        *g.shape,
        *places,
        [float(x) for x in c],
        *rates,
        *cotangents,
        _out(d_phi),
        _out(u),
        [_out(x) for x in d_before],
        0 if d_alpha is None else d_alpha.data_ptr(),
        0 if d_coefficients is None else d_coefficients.data_ptr(),
        torch.get_num_threads(),
    )
    return Adjoint(d_phi, u, d_before, d_alpha, d_coefficients)


def _new(g: Tensor) -> Tensor:
    return torch.empty_like(g, memory_format=torch.contiguous_format)


def _out(x: Tensor | None) -> Place:
    return NOWHERE if x is None else (x.data_ptr(), x.shape[1])


def _place(name: str, x: Tensor | None, g: Tensor) -> Place:
    return NOWHERE if x is None else (x.data_ptr(), read(OP, name, x, g.shape, g.dtype))


def _places(name: str, form: Form, state: State, g: Tensor) -> list[Place]:
    """Of every part of a state; those that the form has not must not be there."""
    for part, x, has in zip(State._fields, state, form.has, strict=True):
        if x is not None and not has:
            checks.fail(ValueError, OP, f"{name}.{part}", f"None for {form.name}", "a tensor")
    return [_place(f"{name}.{part}", x, g) for part, x in zip(State._fields, state, strict=True)]

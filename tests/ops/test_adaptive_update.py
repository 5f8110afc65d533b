"""The adaptive update: the reference against autograd, the kernels against the reference, zeros, messages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmeta.core import native as loader
from fastmeta.ops.adaptive_update import native, op, reference
from fastmeta.ops.adaptive_update.form import Coefficients, Form, State
from tests.ops.test_inner_update import DTYPES, KINDS, make_alpha, make_rows

FORMS = list(Form)
# No two alike, so that none can stand for another.
NUMBERS = Coefficients(0.3, 0.7, 0.25, 0.8, 0.35, 1.2, 1.3, 0.15, 0.45, 0.6, 0.2)


def make_state(form: Form, T: int, P: int, dtype: torch.dtype, layout: str = "contiguous") -> State:
    """Moments of which the centred form's root is positive; about half of the largest are still the largest."""
    first = make_rows(layout, T, P, dtype) * 0.1
    second = make_rows(layout, T, P, dtype).square() + 0.1
    largest = second * (0.4 + torch.rand(T, P, dtype=dtype))
    parts = (first, second, largest, make_rows(layout, T, P, dtype))
    return State(*(x if has else None for x, has in zip(parts, form.has, strict=True)))


def make_call(form: Form, T: int, P: int, dtype: torch.dtype, kind: str = "scalar", layout: str = "contiguous") -> Any:
    """Arguments of a step."""
    return (
        form,
        make_rows(layout, T, P, dtype),
        make_rows(layout, T, P, dtype),
        make_state(form, T, P, dtype, layout),
        NUMBERS,
        *make_alpha(kind, P, dtype),
    )


def cotangents(call: Any) -> tuple[Tensor, State]:
    return torch.randn_like(call[1]), State(*(None if x is None else torch.randn_like(x) for x in call[3]))


def adjoint_of(call: Any, lam: Tensor, d_after: State) -> Any:
    form, phi, g, state, c, alpha, segments = call
    return form, lam, d_after, phi, g, state, c, alpha, segments


def flat(found: Any) -> list[Tensor]:
    """Tensors of a nest, in order."""
    return [found] if isinstance(found, Tensor) else [] if found is None else [y for x in found for y in flat(x)]


# ---- the reference


def through(form: Form, kind: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The step as a function of its tensors, the coefficients among them, and the tensors."""
    form, phi, g, state, c, alpha, segments = make_call(form, 2, 6, torch.float64, kind)
    values = [phi, g, *(x for x in state if x is not None), torch.tensor(c, dtype=torch.float64), alpha]

    def f(phi: Tensor, g: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *parts, numbers, alpha = rest
        given = iter(parts)
        before = State(*(next(given) if has else None for has in form.has))
        made, after = reference.step(form, phi, g, before, Coefficients(*numbers.unbind()), alpha, segments)
        return made, *flat(after)

    return f, [x.detach().clone().requires_grad_() for x in values]


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_and_gradgradcheck(form: Form) -> None:
    f, inputs = through(form, "scalar")
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_adjoint_is_that_of_autograd(form: Form, kind: str) -> None:
    torch.manual_seed(1)
    f, inputs = through(form, kind)
    torch.manual_seed(1)
    call = make_call(form, 2, 6, torch.float64, kind)
    lam, d_after = cotangents(call)
    d_phi, d_g, *others = torch.autograd.grad(f(*inputs), inputs, [lam, *flat(d_after)])
    *d_state, d_numbers, d_alpha = others
    for need in (True, False):
        found = reference.adjoint(*adjoint_of(call, lam, d_after), need)
        torch.testing.assert_close(flat(found[:3]), [d_phi, -d_g, *d_state], rtol=1e-11, atol=1e-12)
        assert (found.d_alpha is not None) == need
    found = reference.adjoint(*adjoint_of(call, lam, d_after))
    torch.testing.assert_close(found.d_coefficients, d_numbers, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.d_alpha, d_alpha, rtol=1e-11, atol=1e-12)


# ---- the kernels, in every instruction set

SHAPES = [(1, 1), (3, 17), (2, 1025), (5, 300), (0, 4), (3, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_kernels_against_the_reference(instruction_set: str, form: Form, dtype: torch.dtype) -> None:
    bound = 64 * torch.finfo(dtype).eps  # some roundings of sums whose terms are of about one size
    layouts = itertools.cycle(["contiguous", "apart", "shared", "apart", "contiguous"])
    for (T, P), kind, layout in ((*x, next(layouts)) for x in itertools.product(SHAPES, KINDS)):
        call = make_call(form, T, P, dtype, kind, layout)
        phi, state = native.step(*call)
        torch.testing.assert_close(flat((phi, state)), flat(reference.step(*call)), rtol=bound, atol=bound)
        arguments = adjoint_of(call, *cotangents(call))
        found, wanted = native.adjoint(*arguments), reference.adjoint(*arguments)
        torch.testing.assert_close(flat(found[:3]), flat(wanted[:3]), rtol=bound, atol=bound)
        torch.testing.assert_close(found.d_alpha, wanted.d_alpha, rtol=bound, atol=bound * T * P)
        torch.testing.assert_close(found.d_coefficients, wanted.d_coefficients, rtol=bound, atol=bound * T * P)
        alone = native.adjoint(*arguments, False)
        assert all(map(torch.equal, flat(alone[:3]), flat(found[:3])))
        assert alone.d_alpha is alone.d_coefficients is None


@pytest.mark.parametrize("form", FORMS)
def test_nothing_stands_for_zeros(instruction_set: str, form: Form) -> None:
    """A first step, and the adjoint of a last one, without weight decay."""
    form, phi, g, _, c, alpha, _ = make_call(form, 3, 1030, torch.float64)
    c = c._replace(decay=0.0, shrink=0.0)
    zeros = State(*(torch.zeros_like(g) if has else None for has in form.has))
    for run in (native, reference):
        found = run.step(form, phi, g, State(), c, alpha)
        assert all(map(torch.equal, flat(found), flat(run.step(form, phi, g, zeros, c, alpha))))
        lam = torch.randn_like(g)
        short = run.adjoint(form, lam, State(), None, g, State(), c, alpha)
        whole = run.adjoint(form, lam, zeros, phi, g, zeros, c, alpha)
        assert short.lam is None
        assert torch.equal(whole.lam, lam)
        assert all(map(torch.equal, flat((short.u, short.state, short.d_alpha)), flat(whole[1:4])))
        assert torch.equal(short.d_coefficients[1:-1], whole.d_coefficients[1:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_instruction_sets_return_the_same_bits(
    instruction_set: str, extension: ModuleType, form: Form, dtype: torch.dtype
) -> None:
    call = make_call(form, 3, 1037, dtype, "tensor")
    arguments = adjoint_of(call, *cotangents(call))
    here = flat((native.step(*call), native.adjoint(*arguments)))
    extension.use_instruction_set("plain")
    assert all(map(torch.equal, here, flat((native.step(*call), native.adjoint(*arguments)))))


@pytest.mark.parametrize("kind", ["scalar", "tensor", "element"])
def test_any_number_of_threads_returns_the_same_bits(
    extension: ModuleType, set_threads: Callable[[int], None], kind: str
) -> None:
    call = make_call(Form.AVERAGED, 4, 200_003, torch.float32, kind)
    arguments = adjoint_of(call, *cotangents(call))
    set_threads(1)
    alone = flat((native.step(*call), native.adjoint(*arguments)))
    for threads in (2, 5):
        set_threads(threads)
        assert all(map(torch.equal, alone, flat((native.step(*call), native.adjoint(*arguments)))))


# ---- zeros


@pytest.mark.parametrize("run", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_zero_moments(extension: ModuleType, run: ModuleType, form: Form) -> None:
    """The derivative at gradients of zero is that of ``n / eps``, eq. (22); NaN and infinity are not hidden."""
    g = torch.zeros(2, 19, dtype=torch.float64)
    lam, phi, rate = torch.randn_like(g), torch.randn_like(g), torch.tensor(0.1, dtype=torch.float64)
    take = NUMBERS.take_first if form.averaged else 1.0
    for eps, eps_root, slope in ((0.45, 0.0, 1 / 0.45), (0.0, 0.15, 0.15**-0.5), (0.0, 0.0, 0.0)):
        c = NUMBERS._replace(eps=eps, eps_root=eps_root, decay=0.0, shrink=0.0)
        made, after = run.step(form, phi, g, State(), c, rate)
        assert torch.equal(made, phi)
        assert all(torch.equal(x, g) for x in flat(after))
        found = run.adjoint(form, lam, State(), phi, g, State(), c, rate)
        assert all(torch.isfinite(x).all() for x in flat(found))
        torch.testing.assert_close(found.u, 0.1 * lam * c.of_first * take * slope)
        assert found.d_coefficients[1:-1].count_nonzero() == found.d_alpha.count_nonzero() == 0
    for bad in (float("nan"), float("inf")):
        moved = run.step(form, phi, g + bad, State(), NUMBERS, rate)[0]
        assert not torch.isfinite(moved).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps_root", [0.0, 1e-3])
def test_the_derivative_at_zero_is_the_limit(form: Form, eps_root: float) -> None:
    """Two steps of gradients that go to zero: values and derivatives by both go to those at zero."""
    numbers = NUMBERS._replace(eps_root=eps_root, decay=0.0)
    phi, rate = torch.zeros(1, 4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    directions = torch.randn(2, 1, 4, dtype=torch.float64)

    def slopes(size: float) -> tuple[Tensor, ...]:
        g = (size * directions).requires_grad_()
        moved, state = reference.step(form, phi, g[0], State(), numbers, rate)
        moved, _ = reference.step(form, moved, g[1], state, numbers, rate)
        return torch.autograd.grad(moved.sum(), g)

    torch.testing.assert_close(slopes(1e-9), slopes(0.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(slopes(-1e-9), slopes(0.0), rtol=1e-6, atol=0)


# ---- backends and messages


def test_without_the_extension_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(Form.LARGEST, 2, 5, torch.float32)
    monkeypatch.setattr(loader, "_load", lambda: (None, "it was not built"))
    assert all(map(torch.equal, flat(op.step(*call)), flat(reference.step(*call))))
    arguments = adjoint_of(call, *cotangents(call))
    assert all(map(torch.equal, flat(op.adjoint(*arguments)), flat(reference.adjoint(*arguments))))
    with pytest.raises(RuntimeError, match="adaptive_update: backend 'native' is not available here: it was not built"):
        native.step(*call)
    assert [b.available for b in op.backends(torch.device("cpu"))] == [False, True]


def test_the_entry_points_refuse_a_graph() -> None:
    form, phi, g, state, c, alpha, _ = make_call(Form.SECOND, 2, 3, torch.float32)
    learned = c._replace(eps=torch.tensor(0.1, requires_grad=True))
    calls = [
        partial(op.step, form, phi, g.clone().requires_grad_(), state, c, alpha),
        partial(op.step, form, phi, g, state, learned, alpha),
        partial(op.adjoint, form, phi, State(), phi.clone().requires_grad_(), g, state, c, alpha),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"adaptive_update: .* not differentiable"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize(
    ("kind", "message", "changed"),
    [
        (ValueError, r"phi must be of shape \[2, 3\], got \[1, 3\]", {"phi": torch.ones(1, 3)}),
        (TypeError, "phi must be float32", {"phi": torch.ones(2, 3, dtype=torch.float64)}),
        (ValueError, "g must be contiguous along its last axis", {"g": torch.ones(3, 2).T}),
        (ValueError, r"state.second must be of shape \[2, 3\]", {"state": State(second=torch.ones(2, 2))}),
        (ValueError, "state.buffer must be None for SECOND, got a tensor", {"state": State(buffer=torch.ones(2, 3))}),
        (ValueError, "alpha must have 1, or 3 entries, got 2", {"alpha": torch.ones(2)}),
    ],
)
def test_messages_of_the_kernels(
    extension: ModuleType, kind: type[Exception], message: str, changed: dict[str, Any]
) -> None:
    x = torch.ones(2, 3)
    arguments = {"form": Form.SECOND, "phi": x, "g": x, "state": State(), "c": NUMBERS, "alpha": torch.tensor(0.1)}
    with pytest.raises(kind, match=f"adaptive_update: {message}"):
        native.step(**{**arguments, **changed})

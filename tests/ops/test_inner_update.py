"""The inner update's kernels against the float64 reference, and its derivatives of every order against torch's."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import threading
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastmeta
from fastmeta.core import native as loader
from fastmeta.ops.inner_update import native, op, reference

KINDS = ["scalar", "one", "tensor", "element"]
DTYPES = [torch.float32, torch.float64]
# hypothesis draws inside one test call, for which the instruction set stays the same: the fixture need not be renewed
per_instruction_set = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def offsets(P: int) -> Tensor:
    """Five tensors: an empty one, one of a single entry (where P allows), and the rest in uneven parts."""
    cuts = sorted({min(P, c) for c in (1, P // 3, P - P // 5)})
    return torch.tensor([0, 0, *cuts, P])


def make_alpha(kind: str, P: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    segments = offsets(P) if kind == "tensor" else None
    shape = {"scalar": (), "one": (1,), "element": (P,)}.get(kind)
    return torch.rand((segments.numel() - 1,) if segments is not None else shape, dtype=dtype), segments


def make_rows(layout: str, T: int, P: int, dtype: torch.dtype) -> Tensor:
    if layout == "shared":
        return torch.randn(P, dtype=dtype).expand(T, P)
    if layout == "apart":
        return torch.randn(T, P + 3, dtype=dtype)[:, 1 : P + 1]
    return torch.randn(T, P, dtype=dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    T = draw(st.sampled_from([0, 1, 2, 7, 33]))
    P = draw(st.sampled_from([0, 1, 2, 15, 16, 17, 1025]) | st.integers(0, 9000))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layouts = st.sampled_from(["contiguous", "apart", "shared"])
    theta, g = make_rows(draw(layouts), T, P, dtype), make_rows(draw(layouts), T, P, dtype)
    return theta, g, *make_alpha(draw(st.sampled_from(KINDS)), P, dtype)


# ---- the two kernels, in every instruction set


@given(call=calls())
@per_instruction_set
def test_step_rounds_as_the_reference(instruction_set: str, call: Any) -> None:
    theta, g, alpha, segments = call
    out = poisoned(*g.shape, dtype=g.dtype)
    assert native.step(theta, g, alpha, segments, out=out) is out
    # one product and one difference, each rounded once: the same bits as torch's
    assert torch.equal(out, reference.step(theta, g, alpha, segments))
    exact = reference.step(theta.double(), g.double(), alpha.double(), segments)
    eps = torch.finfo(g.dtype).eps
    product = reference.adjoint(g.double(), g.double(), alpha.double(), segments, False)[0]
    # half an ulp of the product and half an ulp of the difference, doubled for second-order terms
    assert ((out.double() - exact).abs() <= eps * (product.abs() + exact.abs())).all()


@given(call=calls())
@per_instruction_set
def test_adjoint_against_exact_sums(instruction_set: str, call: Any) -> None:
    lam, g, alpha, segments = call
    out = poisoned(*g.shape, dtype=g.dtype), poisoned(*alpha.shape, dtype=g.dtype)
    u, d_alpha = native.adjoint(lam, g, alpha, segments, True, out=out)
    assert (u, d_alpha) == out or (u is out[0] and d_alpha is out[1])
    assert torch.equal(u, reference.adjoint(lam, g, alpha, segments, False)[0])  # one rounded product
    terms = g.double() * lam.double()
    eps, wide = torch.finfo(g.dtype).eps, torch.finfo(torch.float64).eps
    owned = [columns.flatten().tolist() for columns in owned_columns(terms, alpha, segments)]
    for entry, columns in zip(d_alpha.flatten().tolist(), owned, strict=True):
        exact, size = -math.fsum(columns), math.fsum(map(abs, columns))
        # The final rounding to the dtype, and of float64 sums: at most n roundings for float32 (summed plainly), and
        # for float64 (summed with their errors) the four of the tree over 16 lanes and those of adding up the pieces.
        roundings = len(columns) if g.dtype == torch.float32 else 8
        assert abs(entry - exact) <= eps * abs(exact) + roundings * wide * size


def owned_columns(x: Tensor, alpha: Tensor, segments: Tensor | None) -> list[Tensor]:
    """What is summed into each entry of alpha."""
    if segments is not None:
        at = segments.tolist()
        return [x[:, a:b] for a, b in itertools.pairwise(at)]
    return [x] if alpha.numel() == 1 else list(x.unbind(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["scalar", "element"])
def test_many_small_terms_after_large_ones_are_not_lost(instruction_set: str, kind: str, dtype: Any) -> None:
    T, P = (1, 80_016) if kind == "scalar" else (5001, 3)
    eps = torch.finfo(dtype).eps
    g = torch.full((T, P), eps / 4, dtype=dtype)  # half of what a sum of the ones alone would still notice
    g[0, :16] = 1.0
    alpha, _ = make_alpha(kind, P, dtype)
    exact = 16 + 80_000 * eps / 4 if kind == "scalar" else 1 + 5000 * eps / 4
    d_alpha = native.adjoint(torch.ones_like(g), g, alpha)[1]
    assert ((d_alpha.double() + exact).abs() <= eps * exact).all()  # the final rounding; lost terms make 1250 of these


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_instruction_sets_return_the_same_bits(
    instruction_set: str, extension: ModuleType, kind: str, dtype: Any
) -> None:
    lam, g = torch.randn(5, 5001, dtype=dtype), torch.randn(5, 5001, dtype=dtype)
    alpha, segments = make_alpha(kind, 5001, dtype)
    here = native.adjoint(lam, g, alpha, segments)
    extension.use_instruction_set("plain")
    assert all(torch.equal(a, b) for a, b in zip(here, native.adjoint(lam, g, alpha, segments), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_returns_the_same_bits(
    extension: ModuleType, set_threads: Callable[[int], None], kind: str, dtype: Any
) -> None:
    T, P = 6, 400_003  # 29 MB and more are touched, which is worth seven threads
    lam, g = torch.randn(T, P, dtype=dtype), torch.randn(T, P, dtype=dtype)
    alpha, segments = make_alpha(kind, P, dtype)
    set_threads(1)
    phi, (u, d_alpha) = native.step(lam, g, alpha, segments), native.adjoint(lam, g, alpha, segments)
    for threads in (2, 3, 8):
        set_threads(threads)
        out = (poisoned(T, P, dtype=dtype), poisoned(*alpha.shape, dtype=dtype))
        assert torch.equal(phi, native.step(lam, g, alpha, segments, out=poisoned(T, P, dtype=dtype)))
        native.adjoint(lam, g, alpha, segments, out=out)
        assert torch.equal(u, out[0])
        assert torch.equal(d_alpha, out[1])


def test_writes_only_its_rows(extension: ModuleType) -> None:
    T, P = 5, 1025
    theta, g = torch.randn(T, P), torch.randn(T, P)
    frame = torch.full((T + 2, P + 20), 7.0)
    native.step(theta, g, torch.tensor(0.1), out=frame[1:-1, 10 : P + 10])
    inside = torch.zeros_like(frame, dtype=torch.bool)
    inside[1:-1, 10 : P + 10] = True
    assert (frame[~inside] == 7.0).all()
    assert torch.equal(frame[1:-1, 10 : P + 10], reference.step(theta, g, torch.tensor(0.1)))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place(extension: ModuleType, kind: str) -> None:
    theta, g = torch.randn(4, 2500), torch.randn(4, 2500)
    alpha, segments = make_alpha(kind, 2500, torch.float32)
    phi, (u, d_alpha) = reference.step(theta, g, alpha, segments), native.adjoint(theta, g, alpha, segments)
    lam = theta.clone()
    found = native.adjoint(lam, g, alpha, segments, out=(lam, torch.empty_like(alpha)))
    assert torch.equal(found[0], u)
    assert torch.equal(found[1], d_alpha)
    native.step(theta, g, alpha, segments, out=theta)
    assert torch.equal(theta, phi)


def test_infinite_and_nan_terms_stay(extension: ModuleType) -> None:
    for dtype in DTYPES:
        g = torch.ones(2, 40, dtype=dtype)
        g[0, 3] = math.inf
        alpha = torch.tensor(0.5, dtype=dtype)
        assert native.adjoint(torch.ones_like(g), g, alpha)[1].item() == -math.inf
        g[1, 7] = math.nan
        assert math.isnan(native.adjoint(torch.ones_like(g), g, alpha)[1].item())
        assert torch.equal(native.step(g, g, alpha).isnan(), g.isnan() | g.isinf())


def _step_in_child(x: Tensor, alpha: Tensor, queue: Any) -> None:
    queue.put(float(native.step(x, x, alpha).numpy().sum()))  # numpy: torch's own threads do not survive a fork


def test_a_forked_child_has_threads_of_its_own(extension: ModuleType, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    x, alpha = torch.ones(4, 500_000), torch.tensor(0.25)  # 24 MB are touched: worth two threads
    native.step(x, x, alpha)  # the parent's threads exist now; the child has none of them
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_step_in_child, args=(x, alpha, queue), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=300) == 1_500_000.0  # a child without threads would wait for ever
    finally:
        child.kill()
        child.join()


def test_callers_in_several_threads(extension: ModuleType, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    theta, g, alpha = torch.randn(4, 300_000), torch.randn(4, 300_000), torch.rand(300_000)
    expected, found = native.adjoint(theta, g, alpha), []

    def work() -> None:
        found.extend(native.adjoint(theta, g, alpha) for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 20
    assert all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected, strict=True))


# ---- derivatives


def packed(kind: str, T: int = 3, P: int = 7) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    alpha, segments = make_alpha(kind, P, torch.float64)
    return (torch.randn(T, P, dtype=torch.float64), torch.randn(T, P, dtype=torch.float64), alpha), segments


def through(update: Callable[..., Tensor], segments: Tensor | None) -> Callable[..., Tensor]:
    """A scalar whose derivatives of every order in every argument go through ``update``."""
    return lambda theta, g, alpha: (update(theta, theta**2 * g, alpha, segments) ** 3).sum()


def close(found: Any, expected: Any) -> bool:
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    # float64 on small problems: a few thousand roundings are far below, a wrong term far above
    return all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(extension: ModuleType, kind: str, backend: str) -> None:
    inputs, segments = packed(kind)
    inputs = tuple(x.requires_grad_() for x in inputs)

    def update(*args: Tensor) -> Tensor:
        return fastmeta.inner_update(*args, segments, backend=backend)

    assert torch.autograd.gradcheck(
        update, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(update, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_reference_adjoint_is_the_transpose_of_step() -> None:
    for kind in KINDS:
        (theta, g, alpha), segments = packed(kind)
        lam = torch.randn_like(theta)
        _, pull = torch.func.vjp(lambda g, alpha: reference.step(theta, g, alpha, segments), g, alpha)  # noqa: B023
        u, d_alpha = reference.adjoint(lam, g, alpha, segments)
        assert close(pull(lam), (-u, d_alpha))


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_second_and_third_order(extension: ModuleType, kind: str, argument: int) -> None:
    inputs, segments = packed(kind, T=2, P=4)
    ours, plain = through(fastmeta.inner_update, segments), through(reference.step, segments)
    for derivative in (grad, hessian, lambda f, n: jacfwd(jacrev(jacrev(f, n), n), n)):
        assert close(derivative(ours, argument)(*inputs), derivative(plain, argument)(*inputs))


def test_meta_gradient_of_a_quadratic_in_closed_form(extension: ModuleType) -> None:
    """With ls = theta A theta / 2, phi = (I - alpha A) theta, and |phi|^2 / 2 has the gradient (I - alpha A)^2 theta.

    A second derivative that is lost on the way leaves (I - alpha A) theta, first-order MAML's.
    """
    P, alpha = 6, torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    A = torch.randn(P, P, dtype=torch.float64)
    A = A + A.T
    theta = torch.randn(1, P, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad((theta @ A * theta).sum() / 2, theta, create_graph=True)
    phi = fastmeta.inner_update(theta, g, alpha, backend="native")
    d_theta, d_alpha = torch.autograd.grad((phi**2).sum() / 2, (theta, alpha), create_graph=True)
    step = torch.eye(P, dtype=torch.float64) - alpha * A
    assert close(d_theta, theta @ step @ step)
    assert not close(d_theta, theta @ step)
    assert close(d_alpha, -(theta @ step @ A * theta).sum())
    # and once more: d2 J / d alpha2 = theta A A theta
    assert close(torch.autograd.grad(d_alpha, alpha)[0], (theta @ A @ A * theta).sum())


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 1, None), (None, None, 0), (1, 0, 0), (0, 0, None)])
@pytest.mark.parametrize("kind", ["scalar", "tensor", "element"])
def test_vmap_of_values_gradients_and_tangents(extension: ModuleType, kind: str, mapped: Any) -> None:
    inputs, segments = packed(kind, T=2, P=5)
    inputs = tuple(
        x if dim is None else torch.stack([x, x * 2, x - 1], dim) for x, dim in zip(inputs, mapped, strict=True)
    )
    direct = vmap(partial(fastmeta.inner_update, segments=segments), mapped)(*inputs)
    assert torch.equal(direct, vmap(partial(reference.step, segments=segments), mapped)(*inputs))
    ours, plain = through(fastmeta.inner_update, segments), through(reference.step, segments)
    everything = (0, 1, 2)
    for of in (
        lambda f: f,
        lambda f: grad(f, everything),
        lambda f: lambda *x: jvp(f, x, tuple(torch.ones_like(y) for y in x)),
        lambda f: lambda *x: jvp(grad(f, everything), x, x)[1],
    ):
        assert close(vmap(of(ours), mapped)(*inputs), vmap(of(plain), mapped)(*inputs))


def test_vmap_over_tasks_with_shared_parameters(extension: ModuleType) -> None:
    theta, g = torch.randn(9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    alpha = torch.tensor(0.1, dtype=torch.float64)
    found = vmap(fastmeta.inner_update, (None, 0, None))(theta, g, alpha)
    assert torch.equal(found, fastmeta.inner_update(theta, g, alpha))
    twice = vmap(vmap(fastmeta.inner_update, (None, 0, None)), (0, None, None))(torch.stack([theta, -theta]), g, alpha)
    assert torch.equal(twice[0], found)
    assert torch.equal(twice[1], fastmeta.inner_update(-theta, g, alpha))


def test_gradients_of_a_shared_theta_sum_over_tasks(extension: ModuleType) -> None:
    theta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    phi = fastmeta.inner_update(theta, torch.randn(3, 5, dtype=torch.float64), 0.1)
    weights = torch.randn_like(phi)
    phi.backward(weights)
    assert close(theta.grad, weights.sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_fullgraph(kind: str) -> None:
    inputs, segments = packed(kind)
    torch._dynamo.reset()
    f = through(fastmeta.inner_update, segments)
    compiled = torch.compile(lambda *x: (f(*x), grad(f, (0, 1, 2))(*x)), fullgraph=True, backend="aot_eager")
    value, gradients = compiled(*inputs)
    assert close(value, f(*inputs))
    assert close(gradients, grad(through(reference.step, segments), (0, 1, 2))(*inputs))


@pytest.mark.slow
def test_compile_fullgraph_with_inductor() -> None:
    inputs, segments = packed("tensor", T=3, P=1025)
    inputs = tuple(x.requires_grad_() for x in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: fastmeta.inner_update(*x, segments), fullgraph=True)
    found, expected = compiled(*inputs), reference.step(*inputs, segments)
    assert close(found, expected)
    assert close(torch.autograd.grad((found**2).sum(), inputs), torch.autograd.grad((expected**2).sum(), inputs))


# ---- backends and messages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_runs_on_the_reference(dtype: torch.dtype, kind: str) -> None:
    T, P = 3, 1025
    alpha, segments = make_alpha(kind, P, dtype)
    lam, g = torch.randn(T, P, dtype=dtype), torch.randn(T, P, dtype=dtype)
    u, d_alpha = op.adjoint(lam, g, alpha, segments)
    assert u.dtype == d_alpha.dtype == dtype
    exact = reference.adjoint(lam.double(), g.double(), alpha.double(), segments)[1]
    size = reference.adjoint(lam.double().abs(), g.double().abs(), alpha.double(), segments)[1].abs()
    # one rounding to the dtype, and float32 sums of T * P terms whose errors add like a random walk
    bound = torch.finfo(dtype).eps * exact.abs() + torch.finfo(torch.float32).eps * math.sqrt(T * P) * size
    assert ((d_alpha.double() - exact).abs() <= bound).all()
    with pytest.raises(RuntimeError, match="'native' is not available here: has float32 and float64"):
        fastmeta.inner_update(lam, g, alpha, segments, backend="native")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind: str) -> None:
    inputs, segments = packed(kind, T=3, P=1025)
    there = tuple(x.cuda().requires_grad_() for x in inputs)
    here = tuple(x.requires_grad_() for x in inputs)
    found, expected = (fastmeta.inner_update(*x, segments) for x in (there, here))
    assert found.is_cuda
    assert close(found.cpu(), expected)
    gradients = [torch.autograd.grad((y**2).sum(), x) for y, x in ((found, there), (expected, here))]
    assert close(tuple(x.cpu() for x in gradients[0]), gradients[1])
    with pytest.raises(RuntimeError, match="runs on cpu, not on cuda"):
        fastmeta.inner_update(*there, segments, backend="native")


def test_an_explicit_request_that_cannot_be_met_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"backend must be one of 'native', 'triton', 'reference', got 'cuda'"):
        fastmeta.inner_update(x, x, 0.1, backend="cuda")
    with pytest.raises(RuntimeError, match="'triton' is not available here: runs on cuda, not on cpu"):
        fastmeta.inner_update(x, x, 0.1, backend="triton")
    monkeypatch.setattr(loader, "_load", lambda: (None, "it was not built"))
    with pytest.raises(RuntimeError, match="'native' is not available here: it was not built"):
        fastmeta.inner_update(x, x, 0.1, backend="native")
    with pytest.raises(RuntimeError, match="it was not built"):
        native.step(x, x, torch.tensor(0.1))
    assert torch.equal(fastmeta.inner_update(x, x, 0.5), x / 2)
    assert torch.equal(op.step(x, x, torch.tensor(0.5)), x / 2)
    assert [b.available for b in op.backends(torch.device("cpu"))] == [False, False, True]


def test_the_entry_points_of_the_engine_refuse_a_graph() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    for call in (lambda: op.step(x, x, torch.tensor(0.1)), lambda: op.adjoint(x, x, torch.tensor(0.1))):
        with pytest.raises(RuntimeError, match="not differentiable"):
            call()
        with torch.no_grad():
            call()


X = torch.ones(2, 3)
A = torch.tensor(0.1)
OFFSETS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (TypeError, "theta must be a torch.Tensor, got list", ([1.0], X, A)),
        (TypeError, "theta must be a floating-point tensor, got int64", (X.long(), X, A)),
        (TypeError, r"grad must be float32 \(that of theta\), got float64", (X, X.double(), A)),
        (TypeError, r"alpha must be float32 \(that of theta\), got float64", (X, X, A.double())),
        (TypeError, "alpha must be a torch.Tensor, got str", (X, X, "0.1")),
        (ValueError, r"grad must be on cpu \(that of theta\), got a tensor on meta", (X, X.to("meta"), A)),
        (ValueError, r"grad must be of shape \[T, P\] or \[P\], got \[1, 2, 3\]", (X, X[None], A)),
        (ValueError, r"theta must be of shape \[2, 3\] or \[3\], got \[3, 3\]", (torch.ones(3, 3), X, A)),
        (ValueError, r"alpha must be of shape \[\], \[1\], \[3\], got \[2\]; .* needs segments", (X, X, torch.ones(2))),
        (ValueError, r"alpha must be of shape .*, \[2\], got \[4\]", (X, X, torch.ones(4), OFFSETS)),
        (TypeError, "segments must be int64, got int32", (X, X, torch.ones(2), OFFSETS.int())),
        (ValueError, r"segments must be of shape \[S \+ 1\], got \[1, 3\]", (X, X, torch.ones(2), OFFSETS[None])),
        (ValueError, r"rise from 0 to P = 3, got \[0, 2, 1, 3\]", (X, X, torch.ones(3), torch.tensor([0, 2, 1, 3]))),
        (ValueError, r"rise from 0 to P = 3, got \[0, 1, 4\]", (X, X, torch.ones(2), torch.tensor([0, 1, 4]))),
    ],
)
def test_messages(kind: type[Exception], message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(kind, match=f"inner_update: {message}" if message[0] != "r" else message):
        fastmeta.inner_update(*arguments)


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ValueError, "theta must be contiguous along its last axis", lambda: native.step(torch.ones(3, 2).T, X, A)),
        (ValueError, r"theta must be of shape \[2, 3\], got \[1, 3\]", lambda: native.step(X[:1], X, A)),
        (TypeError, "theta must be float32", lambda: native.step(X.double(), X, A)),
        (TypeError, "theta must be float32 or float64", lambda: native.step(X.half(), X.half(), A.half())),
        (ValueError, "theta must be on cpu", lambda: native.step(X.to("meta"), X, A)),
        (ValueError, "out must be free of overlapping rows", lambda: native.step(X, X, A, out=X[:1].expand(2, 3))),
        (ValueError, "alpha must have 1, or 3 entries, got 2", lambda: native.step(X, X, torch.ones(2))),
        (ValueError, "alpha must have 1, 2 or 3 entries, got 4", lambda: native.step(X, X, torch.ones(4), OFFSETS)),
        (ValueError, "alpha must be contiguous", lambda: native.step(X, X, torch.ones(6)[::2])),
        (ValueError, "segments must rise from 0", lambda: native.step(X, X, torch.ones(2), OFFSETS + 1)),
        (TypeError, "segments must be int64", lambda: native.step(X, X, torch.ones(2), OFFSETS.int())),
        (ValueError, "segments must be S", lambda: native.step(X, X, torch.ones(2), OFFSETS[:0])),
        (TypeError, r"out\[1\] must be a tensor", lambda: native.adjoint(X, X, A, out=(X.clone(), None))),
        (TypeError, r"out\[1\] must be None", lambda: native.adjoint(X, X, A, None, False, out=(X.clone(), A.clone()))),
    ],
)
def test_messages_of_the_kernels(extension: ModuleType, kind: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(kind, match=f"inner_update: {message}"):
        call()

"""Steps of optimizers: values of ``torch.optim``, derivatives of every order, zeros."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from fastmeta.core import optimizer_steps as steps
from fastmeta.core.optimizer_steps import root

CASES = [
    ("sgd", torch.optim.SGD, {"lr": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True}),
    ("adam", torch.optim.Adam, {"lr": 0.1}),
    ("adam", torch.optim.Adam, {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    ("adam", torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.5), "maximize": True, "weight_decay": 0.2}),
    ("adamw", torch.optim.AdamW, {"lr": 0.1}),
    ("adamw", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("radam", torch.optim.RAdam, {"lr": 0.1, "betas": (0.7, 0.8), "weight_decay": 0.1}),
    ("rmsprop", torch.optim.RMSprop, {}),
    ("rmsprop", torch.optim.RMSprop, {"alpha": 0.8, "eps": 1e-2, "centered": True, "weight_decay": 0.1}),
    ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "maximize": True}),
    ("adagrad", torch.optim.Adagrad, {}),
    (
        "adagrad",
        torch.optim.Adagrad,
        {"lr": 0.3, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-2},
    ),
    ("adadelta", torch.optim.Adadelta, {}),
    ("adadelta", torch.optim.Adadelta, {"lr": 0.5, "rho": 0.7, "eps": 1e-2, "weight_decay": 0.1, "maximize": True}),
    ("adamax", torch.optim.Adamax, {}),
    ("adamax", torch.optim.Adamax, {"lr": 0.1, "betas": (0.7, 0.8), "eps": 1e-2, "weight_decay": 0.1}),
    ("asgd", torch.optim.ASGD, {}),
    ("asgd", torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.6, "t0": 2, "weight_decay": 0.1}),
    ("rprop", torch.optim.Rprop, {}),
    ("rprop", torch.optim.Rprop, {"lr": 0.1, "etas": (0.4, 1.5), "step_sizes": (0.05, 0.2), "maximize": True}),
]

# Every number of a step that may be learned, and others that are set.
LEARNED = [
    ("sgd", {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1}, {}),
    ("sgd", {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.0}, {"nesterov": True}),
    ("adam", {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 0.1, "eps_root": 0.2, "weight_decay": 0.1}, {}),
    ("adam", {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 0.1}, {"amsgrad": True}),
    ("adamw", {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 0.1, "weight_decay": 0.1}, {}),
    ("radam", {"lr": 0.1, "beta1": 0.6, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.1}, {}),
    ("rmsprop", {"lr": 0.1, "alpha": 0.7, "eps": 0.1, "momentum": 0.6, "weight_decay": 0.1}, {"nesterov": True}),
    ("rmsprop", {"lr": 0.1, "alpha": 0.7, "eps": 0.1, "eps_root": 0.1}, {"centered": True}),
    ("adagrad", {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2, "eps": 0.1, "weight_decay": 0.1}, {}),
    ("adadelta", {"lr": 0.1, "rho": 0.7, "eps": 0.1, "weight_decay": 0.1}, {}),
    ("adamax", {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 0.1, "weight_decay": 0.1}, {}),
    ("asgd", {"lr": 0.1, "lambd": 0.2, "alpha": 0.7, "weight_decay": 0.1}, {"t0": 1}),
    ("rprop", {"lr": 0.1, "eta_minus": 0.5, "eta_plus": 1.4}, {"step_sizes": (0.01, 10.0)}),
]
PAIRS = {"betas": ("beta1", "beta2"), "etas": ("eta_minus", "eta_plus")}


def gradients(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(number, 2, 3, generator=generator, dtype=torch.float64))


def gathered(named: dict) -> dict:
    """``beta1`` and ``beta2`` as ``betas``, and so on."""
    named = dict(named)
    for pair, names in PAIRS.items():
        if names[0] in named:
            named[pair] = tuple(named.pop(name) for name in names)
    return named


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """``torch.optim.ASGD`` keeps its rate in float32 otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_values_are_those_of_torch_optim(name: str, kind: type[torch.optim.Optimizer], options: dict) -> None:
    start, *given = gradients(7)
    theirs = start.clone().requires_grad_()
    optimizer = kind([theirs], **options)
    defaults = {key: value for key, value in optimizer.defaults.items() if key in signature(name)}
    p, state = start, None
    for g in given:
        theirs.grad = g.clone()
        optimizer.step()
        p, state = getattr(steps, name)(p, g, state, **defaults)
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-12, atol=1e-13)
    if name == "asgd":
        torch.testing.assert_close(state.ax, optimizer.state[theirs]["ax"], rtol=1e-12, atol=1e-13)


def signature(name: str) -> set[str]:
    return set(inspect.signature(getattr(steps, name)).parameters)


@pytest.mark.parametrize(
    "name", ["sgd", "adam", "adamw", "radam", "rmsprop", "adagrad", "adadelta", "adamax", "asgd", "rprop"]
)
def test_defaults_are_those_of_torch_optim(name: str) -> None:
    kind = next(kind for case, kind, _ in CASES if case == name)
    theirs = kind([torch.zeros(1, requires_grad=True)], lr=0.5).defaults
    for key, parameter in inspect.signature(getattr(steps, name)).parameters.items():
        if key in theirs and key != "lr":
            assert parameter.default == theirs[key], key


@pytest.mark.parametrize(("name", "learned", "fixed"), LEARNED)
def test_derivatives_by_everything(name: str, learned: dict[str, float], fixed: dict) -> None:
    """A few steps, by the parameter, the gradients and each hyper-parameter, once and twice."""

    def run(p: torch.Tensor, g: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        state = None
        for one in g:
            p, state = step(p, one, state, **gathered(dict(zip(learned, values, strict=True))))
        return p

    step = partial(getattr(steps, name), **fixed)
    start, *given = gradients(7 if name == "radam" else 4)  # its sixth step is the first that it rectifies
    hyper = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in learned.values()]
    inputs = (start[0, :2].requires_grad_(), torch.stack(given)[:, 0, :2].requires_grad_(), *hyper)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize(
    ("name", "slope"),
    [("adam", 0.1 / 0.3), ("adamw", 0.1 / 0.3), ("rmsprop", 0.1 / 0.3), ("adagrad", 0.1 / 0.3), ("adamax", 0.1 / 0.3)],
)
def test_derivative_at_zero_gradients_is_the_limit(name: str, slope: float) -> None:
    """``lr g / (|g| + eps)`` has the derivative ``lr / eps`` at 0; the same from a difference quotient."""
    step = partial(getattr(steps, name), lr=0.1, eps=0.3)
    options = {"alpha": 0.0} if name == "rmsprop" else {}
    p = torch.zeros(2, dtype=torch.float64)
    g = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    moved, state = step(p, g, **options)
    (found,) = torch.autograd.grad(moved.sum(), g, create_graph=True)
    torch.testing.assert_close(found, torch.full_like(found, -slope), rtol=1e-12, atol=0)
    quotient = (step(p, g + 1e-9, **options)[0] - moved) / 1e-9
    torch.testing.assert_close(quotient, found, rtol=1e-7, atol=0)
    later, _ = step(moved, 0 * g, state, **options)
    assert torch.isfinite(torch.autograd.grad(later.sum() + found.square().sum(), g)[0]).all()


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_everything_is_finite_at_zero_gradients(name: str, kind: type[torch.optim.Optimizer], options: dict) -> None:
    """Two steps in float32 and in float64 along gradients that are zero, whose own derivative is not."""
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(3, dtype=dtype, requires_grad=True)
        options = {"lr": 0.1, **options}
        p, state = torch.ones(3, dtype=dtype), None
        for _ in range(2):
            p, state = getattr(steps, name)(p, 2 * x, state, **options)
        (first,) = torch.autograd.grad(p.sum(), x, create_graph=True)
        assert torch.isfinite(p).all()
        assert torch.isfinite(first).all()
        if first.requires_grad:
            assert torch.isfinite(torch.autograd.grad(first.sum(), x)[0]).all()


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "rmsprop", "adagrad", "adadelta", "adamax"])
@pytest.mark.parametrize("eps", [0.0, torch.zeros(())])
def test_without_eps_a_zero_gradient_takes_no_step(name: str, eps: float | torch.Tensor) -> None:
    """And the others take theirs."""
    x = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    p, state = torch.zeros(2, dtype=torch.float64), None
    for _ in range(2):
        p, state = getattr(steps, name)(p, x, state, lr=0.1, eps=eps)
    (slope,) = torch.autograd.grad(p.sum(), x, create_graph=True)
    assert p[0] == 0
    assert torch.isfinite(p).all()
    assert torch.isfinite(slope).all()
    usual = getattr(steps, name)(p * 0, x, lr=0.1, eps=1e-12)[0]
    torch.testing.assert_close(getattr(steps, name)(p * 0, x, lr=0.1, eps=eps)[0][1], usual[1], rtol=1e-5, atol=1e-6)


def test_root() -> None:
    v = torch.tensor([-1e-17, 0.0, 4.0, float("nan"), float("inf")], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(root(v).sum(), v, create_graph=True)
    assert root(v)[:3].tolist() == [0.0, 0.0, 2.0]
    assert root(v)[3].isnan()
    assert root(v)[4].isinf()
    assert slope[:3].tolist() == [0.0, 0.0, 0.25]
    (curve,) = torch.autograd.grad(slope[:3].sum(), v)
    assert curve[:3].tolist() == [0.0, 0.0, -1 / 32]
    assert root(torch.ones(2)).dtype is torch.float32
    assert torch.func.vmap(root)(torch.ones(2, 3)).shape == (2, 3)


def test_a_tensor_counts_at_zero() -> None:
    momentum = torch.zeros((), dtype=torch.float64, requires_grad=True)
    p, g, second = gradients(3)
    moved, state = steps.sgd(p, g, lr=0.1, momentum=momentum)
    moved, _ = steps.sgd(moved, second, state, lr=0.1, momentum=momentum)
    torch.testing.assert_close(torch.autograd.grad(moved.sum(), momentum)[0], -0.1 * g.sum())


def test_nothing_is_written_in_place() -> None:
    for name, learned, fixed in LEARNED:
        p, g, second = gradients(3)
        kept = p.clone(), g.clone()
        step = partial(getattr(steps, name), **gathered(learned), **fixed)
        _, state = step(p, g)
        before = [x.clone() for x in state if isinstance(x, torch.Tensor)]
        step(p, second, state)
        assert torch.equal(p, kept[0])
        assert torch.equal(g, kept[1])
        assert all(map(torch.equal, before, [x for x in state if isinstance(x, torch.Tensor)]))


@pytest.mark.parametrize(("name", "learned", "fixed"), LEARNED)
def test_float32_stays_float32(name: str, learned: dict[str, float], fixed: dict) -> None:
    p, g = torch.ones(2), torch.ones(2)
    hyper = {key: torch.tensor(value, dtype=torch.float64) for key, value in learned.items()}
    for values in (learned, hyper):
        moved, state = getattr(steps, name)(p, g, **gathered(values), **fixed)
        moved, state = getattr(steps, name)(moved, g, state, **gathered(values), **fixed)
        assert moved.dtype is torch.float32
        assert all(x.dtype is torch.float32 for x in state if isinstance(x, torch.Tensor) and x.dim())

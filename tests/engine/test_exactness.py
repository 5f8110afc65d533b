"""The meta-gradient against autodiff in float64, for every kind of model, both through autograd and around it."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import fastmeta as fm
from tests.engine.cases import CASES, Case, T
from tests.oracle import maml_loop, relative_error, total_error

# float64 has 2^-53 = 1.1e-16; sums of some thousand terms over five steps of a curved loss stay far below this
EXACT = 1e-9


pytestmark = pytest.mark.usefixtures("traced_once")


@functools.cache
def problem(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, nn.Module, tuple[Any, Any]]:
    """A case with its model, the same weights and samples in either precision; tests leave them as they are."""
    torch.manual_seed(0)
    model = CASES[name].model()
    sets = CASES[name].tasks(torch.float64)
    return CASES[name], model.to(dtype), pytree.tree_map_only(torch.is_floating_point, lambda x: x.to(dtype), sets)


def oracle(model, case, support, query, steps, first_order=False):
    with sdpa_kernel(SDPBackend.MATH):
        return maml_loop(model, case.loss, support, query, case.lr, steps, first_order)


@functools.cache
def right(name: str, steps: int, first_order: bool = False) -> Any:
    case, model, sets = problem(name)
    return oracle(model, case, *sets, steps, first_order)


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_second_order_equals_autodiff_in_float64(name: str, steps: int) -> None:
    case, model, (support, query) = problem(name)
    maml = fm.MAML(model, case.loss, lr=case.lr, steps=steps, engine="program")
    tasks = fm.TaskBatch(support, query)
    loss, task_losses, logits, truth = right(name, steps)

    value, gradients = maml.value_and_grad(tasks)
    assert relative_error(gradients, truth) <= EXACT
    assert relative_error(value, loss) <= EXACT

    out = maml(tasks)
    out.loss.backward()
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, truth) <= EXACT
    model.zero_grad()
    assert relative_error(out.task_losses, task_losses) <= EXACT
    assert relative_error(out.logits, logits) <= EXACT
    assert out.support_losses.shape == (steps, T)


@pytest.mark.parametrize("name", CASES)
def test_first_order_equals_autodiff_in_float64(name: str) -> None:
    case, model, (support, query) = problem(name)
    maml = fm.MAML(model, case.loss, lr=case.lr, steps=3, first_order=True, engine="program")
    _, gradients = maml.value_and_grad(fm.TaskBatch(support, query))
    truth = right(name, 3, first_order=True)[3]
    assert relative_error(gradients, truth) <= EXACT


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_good_as_pytorchs_own(name: str, steps: int) -> None:
    """At most twice the error of a PyTorch loop in float32, plus a few units of rounding where that one is lucky."""
    case, model, single = problem(name, torch.float32)
    truth = right(name, steps)[3]
    theirs = oracle(model, case, *single, steps)[3]
    _, ours = fm.MAML(model, case.loss, lr=case.lr, steps=steps, engine="program").value_and_grad(fm.TaskBatch(*single))
    rounding = 20 * torch.finfo(torch.float32).eps
    assert total_error(ours, truth) <= 2 * total_error(theirs, truth) + rounding


ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(0.2), nn.Softplus(), nn.ELU()]


@st.composite
def networks(draw: st.DrawFn) -> Case:
    """A small network of random depth, widths, activations and norms."""
    width = draw(st.integers(1, 5))
    layers: list[nn.Module] = []
    features = width
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.integers(1, 6))
        layers.append(nn.Linear(features, out, bias=draw(st.booleans())))
        norm = draw(st.sampled_from(["none", "layer", "batch"]))
        # a feature alone is its own mean: layer norm over it is constant, and so is its gradient
        if norm == "layer" and out > 1:
            layers.append(nn.LayerNorm(out))
        elif norm == "batch":
            layers.append(nn.BatchNorm1d(out))
        layers.append(draw(st.sampled_from(ACTIVATIONS)))
        features = out
    layers.append(nn.Linear(features, 2))
    network = nn.Sequential(*layers)
    return Case(
        lambda: network,
        lambda n: torch.randn(T, n, width, dtype=torch.float64),
        lambda n: torch.randint(2, (T, n)),
        lr=draw(st.sampled_from([0.01, 0.1])),
    )


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(case=networks(), steps=st.integers(0, 3), support=st.integers(2, 4), query=st.integers(2, 5))
def test_random_networks_are_exact(case: Case, steps: int, support: int, query: int) -> None:
    model = case.model().double()
    sets = case.tasks(torch.float64, support, query)
    truth = oracle(model, case, *sets, steps)[3]
    maml = fm.MAML(model, case.loss, lr=case.lr, steps=steps, engine="program", allow_unused=True)
    _, gradients = maml.value_and_grad(fm.TaskBatch(*sets))
    # batch norm over two samples divides by differences that may be small: 1e-7 allows for that loss of digits
    assert total_error(gradients, truth) <= 1e-7


@pytest.mark.parametrize("name", ["mlp-tanh-mse", "conv4", "residual"])
def test_the_autodiff_engine_agrees(name: str) -> None:
    case, model, sets = problem(name)
    tasks = fm.TaskBatch(*sets)
    _, program = fm.MAML(model, case.loss, lr=case.lr, steps=2, engine="program").value_and_grad(tasks)
    _, autodiff = fm.MAML(model, case.loss, lr=case.lr, steps=2, engine="autodiff").value_and_grad(tasks)
    assert relative_error(program, autodiff) <= EXACT


def test_any_function_of_the_outputs_can_be_differentiated() -> None:
    """Cotangents of task losses and of the logits reach the parameters, not only that of the mean loss."""
    case, model, sets = problem("mlp-relu")
    tasks = fm.TaskBatch(*sets)
    weights = torch.tensor([0.2, 1.5, -0.7], dtype=torch.float64)

    def gradients(engine: str) -> dict[str, torch.Tensor]:
        out = fm.MAML(model, case.loss, lr=case.lr, steps=2, engine=engine)(tasks)
        value = (out.task_losses * weights).sum() + F.softmax(out.logits, -1).square().sum()
        return dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(value, list(model.parameters())), strict=True)
        )

    assert relative_error(gradients("program"), gradients("autodiff")) <= EXACT


def test_a_third_derivative_raises() -> None:
    case = CASES["mlp-tanh-mse"]
    model = case.model().double()
    out = fm.MAML(model, case.loss, lr=case.lr, engine="program")(fm.TaskBatch(*case.tasks(torch.float64)))
    first = next(model.parameters())
    (g,) = torch.autograd.grad(out.loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match="engine='autodiff'"):
        g.sum().backward()


def test_the_autodiff_engine_has_a_third_derivative() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    tasks = fm.TaskBatch(
        (torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1).double()), (torch.ones(1, 1, 1).double(),) * 2
    )
    maml = fm.MAML(model, lambda o, t: (o - t).pow(4).mean(), lr=0.01, engine="autodiff")
    w = model.weight

    def value(theta: torch.Tensor) -> torch.Tensor:
        return (theta - 0.01 * 4 * theta**3 - 1) ** 4

    (g,) = torch.autograd.grad(maml(tasks).loss, w, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), w)
    theta = w.detach().squeeze().requires_grad_()
    (g2,) = torch.autograd.grad(value(theta), theta, create_graph=True)
    (h2,) = torch.autograd.grad(g2, theta)
    assert relative_error(h.squeeze(), h2) <= EXACT

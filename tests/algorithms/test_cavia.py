"""CAVIA against an explicit loop over contexts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.algorithms.problems import EXACT, WAYS, labelled, network
from tests.oracle import relative_error

Apply = Any


def by_hand(apply: Apply, shape: tuple[int, ...], tasks: fm.TaskBatch, steps: int) -> tuple[Tensor, Tensor]:
    """The mean loss, attached to everything but the first context, and the contexts."""
    losses, contexts = [], []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        context = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        for _ in range(steps):
            (d,) = torch.autograd.grad(F.cross_entropy(apply(xs, context), ys), context, create_graph=True)
            context = context - 0.5 * d
        losses.append(F.cross_entropy(apply(xq, context), yq))
        contexts.append(context)
    return torch.stack(losses).mean(), torch.stack(contexts)


@pytest.mark.parametrize("engine", ["program", "autodiff"])
def test_the_meta_gradient_is_exact(engine: Any) -> None:
    model, tasks = network(features=4 + 2), labelled()
    learner = fm.CAVIA(model, F.cross_entropy, 0.5, 3, context=2, engine=engine)

    def apply(x: Tensor, context: Tensor) -> Tensor:
        return model(torch.cat([x, context.repeat(len(x), 1)], 1))

    loss, contexts = by_hand(apply, (2,), tasks, 3)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    value, found = learner.value_and_grad(tasks)
    assert relative_error(value, loss) <= EXACT
    assert relative_error(found, {f"model.{n}": d for n, d in wanted.items()}) <= EXACT
    learner(tasks).loss.backward()
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, wanted) <= EXACT
    assert learner.model.context.grad is None
    adapted = learner.adapt(tasks)
    assert relative_error(adapted.parameters["context"], contexts) <= EXACT
    assert adapted.parameters.keys() == {"context"}


class Modulated(nn.Module):
    """Hidden units scaled and shifted by functions of the context."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.film, self.head = nn.Linear(4, 6), nn.Linear(3, 12), nn.Linear(6, WAYS)


def film(model: Modulated, context: Tensor, x: Tensor) -> Tensor:
    scale, shift = model.film(context).chunk(2)
    return model.head(torch.tanh(model.into(x) * (1 + scale) + shift))


@pytest.mark.parametrize("engine", ["program", "autodiff"])
def test_any_way_of_conditioning(engine: Any) -> None:
    torch.manual_seed(0)
    model, tasks = Modulated().double(), labelled()
    loss, _ = by_hand(lambda x, context: film(model, context, x), (3,), tasks, 2)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = {f"model.{n}": d for n, d in zip(names, torch.autograd.grad(loss, parameters), strict=True)}
    learner = fm.CAVIA(model, F.cross_entropy, 0.5, 2, context=3, condition=film, engine=engine)
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


def test_it_tells_tasks_apart() -> None:
    """Curves that lie higher or lower: without adaptation the error is the variance of their heights, 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1 + 2, 16), nn.Tanh(), nn.Linear(16, 1))
    learner = fm.CAVIA(model, F.mse_loss, 0.5, 2, context=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)

    def sample(tasks: int) -> fm.TaskBatch:
        x = 4 * torch.rand(tasks, 10, 1) - 2
        y = torch.sin(x) + torch.randn(tasks, 1, 1)
        return fm.TaskBatch((x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:]))

    for _ in range(60):
        optimizer.zero_grad()
        learner(sample(10)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert learner(sample(100)).loss < 0.4


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    with pytest.raises(TypeError, match="CAVIA: parameters must be left out"):
        fm.CAVIA(model, F.cross_entropy, parameters=["context"])
    with pytest.raises(TypeError, match="CAVIA: context must be a number or a shape"):
        fm.CAVIA(model, F.cross_entropy, context=2.0)  # type: ignore[arg-type]
    for wrong in (0, (), (2, 3)):
        with pytest.raises(ValueError, match="CAVIA: context must be positive, and of one axis"):
            fm.CAVIA(model, F.cross_entropy, context=wrong)

"""Meta-Curvature against an explicit loop that bends gradients by matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, WAYS, gradients, labelled, network
from tests.oracle import maml_loop, relative_error


def convolution() -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, (2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(18, WAYS)).double()
    plain = labelled(features=32)
    return model, fm.TaskBatch(*[(x.reshape(*x.shape[:2], 2, 4, 4), y) for x, y in (plain.support, plain.query)])


def perceptron() -> tuple[nn.Module, fm.TaskBatch]:
    return network(), labelled()


def bent(g: Tensor, name: str, matrices: dict[str, Tensor]) -> Tensor:
    """By one matrix for the whole gradient: the Kronecker product of those of its axes."""
    if f"{name}.scale" in matrices:
        return torch.diag(matrices[f"{name}.scale"]) @ g
    whole = torch.kron(matrices[f"{name}.out"], matrices[f"{name}.in"])
    if f"{name}.kernel" in matrices:
        whole = torch.kron(whole, matrices[f"{name}.kernel"])
    return (whole @ g.reshape(-1)).reshape(g.shape)


def by_hand(learner: fm.MetaCurvature, tasks: fm.TaskBatch, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss, attached to what is learned, which comes by name; ``lr`` has one rate a step."""
    model = learner.model
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    matrices = {n: m.detach().clone().requires_grad_() for n, m in learner.inner.matrices().items()}
    losses = []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        phi = dict(theta)
        for rate in lr:
            inner = F.cross_entropy(functional_call(model, phi, (xs,)), ys)
            g = torch.autograd.grad(inner, list(phi.values()), create_graph=not learner.first_order)
            phi = {n: p - rate * bent(d, n, matrices) for (n, p), d in zip(phi.items(), g, strict=True)}
        losses.append(F.cross_entropy(functional_call(model, phi, (xq,)), yq))
    return torch.stack(losses).mean(), theta | {f"inner.{n}": m for n, m in matrices.items()}


def shaken(learner: fm.MetaCurvature) -> None:
    """Matrices that are no identity."""
    torch.manual_seed(4)
    with torch.no_grad():
        for matrix in learner.inner.matrices().values():
            matrix += 0.2 * torch.randn_like(matrix)


@pytest.mark.parametrize(("make", "learned_rate"), [(perceptron, False), (convolution, True)])
def test_the_meta_gradient_is_exact(make: Any, learned_rate: bool) -> None:
    model, tasks = make()
    lr = torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64, requires_grad=learned_rate)
    learner = fm.MetaCurvature(model, F.cross_entropy, lr, 3, chunk_size=2)
    shaken(learner)
    learner.first_order = True
    loss, wanted = by_hand(learner, tasks, lr)
    wanted |= {"inner.lr": lr} if learned_rate else {}
    truth = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    assert relative_error(learner.value_and_grad(tasks)[1], truth) <= EXACT
    learner.first_order = False
    loss, wanted = by_hand(learner, tasks, lr)
    wanted |= {"inner.lr": lr} if learned_rate else {}
    truth = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
    value, found = learner.value_and_grad(tasks)
    assert relative_error(value, loss) <= EXACT
    assert relative_error(found, truth) <= EXACT
    learner(tasks).loss.backward()
    own = gradients(model)
    assert relative_error(own, {n: truth[n] for n in own}) <= EXACT
    by_name = {f"inner.{n}": m.grad for n, m in learner.inner.matrices().items()}
    assert relative_error(by_name, {n: truth[n] for n in by_name}) <= EXACT


def test_it_starts_as_maml() -> None:
    model, tasks = perceptron()
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.3, 2, False, ["2.weight", "4.bias"])
    learner = fm.MetaCurvature(model, F.cross_entropy, 0.3, 2, parameters=["2.weight", "4.bias"])
    found = learner.value_and_grad(tasks)[1]
    assert relative_error({n: found[n] for n in truth[3]}, truth[3]) <= EXACT
    assert {n for n in found if n not in truth[3]} == {
        "inner.2.weight.out", "inner.2.weight.in", "inner.4.bias.scale",
    }  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"MetaCurvature: \['engine', 'inner'\] must be left out"):
        fm.MetaCurvature(network(), F.cross_entropy, inner=fm.inner.SGD(0.1), engine="autodiff")

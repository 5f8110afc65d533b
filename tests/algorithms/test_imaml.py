"""Implicit MAML against a dense solve of the implicit system at a minimum found by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from fastmeta.engine.implicit import conjugate_gradients
from fastmeta.engine.work import Implicit
from tests.algorithms.problems import EXACT, gradients, labelled, network
from tests.oracle import relative_error

STRENGTH = 4.0


def regression() -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(3, n, 4, dtype=torch.float64), torch.randn(3, n, 2, dtype=torch.float64)

    return nn.Linear(4, 2).double(), fm.TaskBatch(batch(6), batch(5))


def classification() -> tuple[nn.Module, fm.TaskBatch]:
    return network(), labelled()


PROBLEMS: dict[str, Any] = {"quadratic": (regression, F.mse_loss), "perceptron": (classification, F.cross_entropy)}


def dense(
    model: nn.Module, loss: Any, tasks: fm.TaskBatch, names: list[str], damping: float = 0.0
) -> dict[str, Tensor]:
    """Each task's minimum by Newton's method on dense Hessians, and the implicit gradient by a dense solve."""
    theta = {n: p.detach() for n, p in model.named_parameters()}
    others = [n for n in theta if n not in names]
    shapes, start = [theta[n].shape for n in names], torch.cat([theta[n].reshape(-1) for n in names])
    psi = [theta[n].clone().requires_grad_() for n in others]

    def unpacked(phi: Tensor) -> dict[str, Tensor]:
        pieces = phi.split([s.numel() for s in shapes])
        return {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}

    total = {n: torch.zeros_like(p) for n, p in theta.items()}
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)

        def at(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, {**unpacked(phi), **dict(zip(others, psi, strict=True))}, (x,)), y)

        def inner(phi: Tensor) -> Tensor:
            return at(phi, xs, ys) + STRENGTH / 2 * (phi - start).square().sum()  # noqa: B023

        phi = start.clone()
        for _ in range(7):
            slope = torch.func.grad(inner)(phi)
            phi = phi - torch.linalg.solve(torch.func.hessian(inner)(phi), slope)
        phi = phi.detach().requires_grad_()
        assert torch.func.grad(inner)(phi).norm() < 1e-12
        hessian = torch.func.hessian(lambda p: at(p, xs, ys))(phi).detach()  # noqa: B023
        b, *direct = torch.autograd.grad(at(phi, xq, yq) / len(tasks), [phi, *psi])
        scale = STRENGTH + damping
        v = torch.linalg.solve(hessian + scale * torch.eye(len(start), dtype=torch.float64), b)
        for name, d in unpacked(scale * v).items():
            total[name] += d
        if others:
            (slope,) = torch.autograd.grad(at(phi, xs, ys), phi, create_graph=True)
            mixed = torch.autograd.grad(slope @ v, psi)
            for name, d, m in zip(others, direct, mixed, strict=True):
                total[name] += d - m
    return total


@pytest.mark.parametrize(("problem", "damping"), [("quadratic", 0.0), ("perceptron", 0.7)])
def test_it_is_the_implicit_gradient(problem: str, damping: float) -> None:
    make, loss = PROBLEMS[problem]
    model, tasks = make()
    learner = fm.IMAML(
        model, loss, 0.2, 40, strength=STRENGTH, cg_steps=40, tolerance=1e-12, damping=damping, chunk_size=2
    )
    truth = dense(model, loss, tasks, [n for n, _ in model.named_parameters()], damping)
    assert relative_error(learner.value_and_grad(tasks)[1], truth) <= EXACT
    learner(tasks).loss.backward()
    assert relative_error(gradients(model), truth) <= EXACT
    found = learner.solution
    assert found is not None
    assert found.residual.shape == found.iterations.shape == (3,)
    assert (found.residual <= 1e-11).all()
    assert (found.stationarity <= 1e-11).all()
    assert found.positive.all()


def test_what_does_not_adapt_gets_its_implicit_gradient_too() -> None:
    names = ["2.weight", "4.bias"]  # behind something that is the same at every step, and before something that is not
    model, tasks = classification()
    learner = fm.IMAML(
        model, F.cross_entropy, 0.2, 40, strength=STRENGTH, cg_steps=40, tolerance=1e-12, parameters=names
    )
    truth = dense(model, F.cross_entropy, tasks, names)
    assert relative_error(learner.value_and_grad(tasks)[1], truth) <= EXACT


def test_any_way_to_the_minimum_gives_the_same_gradient() -> None:
    model, tasks = classification()
    options = {"strength": STRENGTH, "cg_steps": 40, "tolerance": 1e-12}
    straight = fm.IMAML(model, F.cross_entropy, 0.2, 40, **options)
    curved = fm.IMAML(model, F.cross_entropy, inner=fm.inner.SGD(0.15, momentum=0.2), steps=50, **options)
    assert relative_error(curved.value_and_grad(tasks)[1], straight.value_and_grad(tasks)[1]) <= EXACT
    assert relative_error(straight.adapt(tasks).parameters, curved.adapt(tasks).parameters) <= EXACT


def test_another_objective_than_the_mean() -> None:
    model, tasks = classification()
    learner = fm.IMAML(model, F.cross_entropy, 0.2, 40, strength=STRENGTH, cg_steps=40, tolerance=1e-12)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    (learner(tasks).task_losses * weights).sum().backward()
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for t, weight in enumerate(weights):
        for name, d in dense(model, F.cross_entropy, tasks[t : t + 1], list(wanted)).items():
            wanted[name] += weight * d
    assert relative_error(gradients(model), wanted) <= EXACT


def test_each_task_ends_where_it_has_converged() -> None:
    """Conjugate gradients need as many iterations as a matrix has different eigenvalues, and none for zero."""
    eigenvalues = [[3.0] * 6, [1.0, 1.0, 1.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6, [-1.0] * 6]
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(5, 6, 6, dtype=torch.float64))[0]
    a = turned @ torch.diag_embed(torch.tensor(eigenvalues, dtype=torch.float64)) @ turned.mT
    b = torch.randn(5, 6, dtype=torch.float64)
    b[3] = 0
    v, iterations, positive = conjugate_gradients(
        lambda p: (a @ p.unsqueeze(2)).squeeze(2), b, Implicit(1.0, 20, 1e-12, 0.0)
    )
    assert iterations.tolist() == [1, 2, 6, 0, 0]
    assert positive.tolist() == [True, True, True, True, False]
    assert relative_error(v[:3], torch.linalg.solve(a, b)[:3]) <= 1e-11
    assert (v[3:] == 0).all()
    few = conjugate_gradients(lambda p: (a @ p.unsqueeze(2)).squeeze(2), b, Implicit(1.0, 3, 1e-12, 0.0))
    assert few[1].tolist() == [1, 2, 3, 0, 0]


def test_a_truncated_solve_says_how_far_it_came() -> None:
    model, tasks = classification()
    learner = fm.IMAML(model, F.cross_entropy, 0.3, 2, strength=0.1, cg_steps=1)
    assert learner.solution is None
    learner.value_and_grad(tasks)
    found = learner.solution
    assert found is not None
    assert (found.residual > 1e-4).all()
    assert (found.stationarity > 1e-3).all()
    assert found.iterations.tolist() == [1, 1, 1]
    learner.chunk_size = 2
    learner.value_and_grad(tasks)
    again = learner.solution
    assert again is not None
    for one, other in zip(again.tensors(), found.tensors(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"IMAML: .*first_order.* must be left out"):
        fm.IMAML(model, F.cross_entropy, first_order=True)
    with pytest.raises(ValueError, match="IMAML: strength must be finite and positive, got 0"):
        fm.IMAML(model, F.cross_entropy, strength=0)
    with pytest.raises(ValueError, match="IMAML: rates must be fixed"):
        fm.IMAML(model, F.cross_entropy, torch.tensor(0.1, requires_grad=True))
    with pytest.raises(ValueError, match="IMAML: cg_steps"):
        fm.IMAML(model, F.cross_entropy, cg_steps=0)

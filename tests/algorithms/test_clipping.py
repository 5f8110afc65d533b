"""Inner gradients clipped to a norm, against autograd of torch's own formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, labelled, network
from tests.oracle import relative_error


def by_hand(
    model: nn.Module, tasks: fm.TaskBatch, rates: Tensor, names: list[str], clip: float, first_order: bool
) -> tuple[dict[str, Tensor], list[bool]]:
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    losses, hit = [], []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        phi, buffer = dict(theta), dict[str, Tensor]()
        for rate in rates:
            inner = F.cross_entropy(functional_call(model, phi, (xs,)), ys)
            g = torch.autograd.grad(inner, [phi[n] for n in names], create_graph=not first_order)
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in g]))
            hit.append(bool(norm > clip))
            for n, d in zip(names, g, strict=True):
                d = d * torch.clamp(clip / (norm + 1e-6), max=1.0)
                buffer[n] = 0.6 * buffer[n] + d if n in buffer else d
                phi[n] = phi[n] - rate * buffer[n]
        losses.append(F.cross_entropy(functional_call(model, phi, (xq,)), yq))
    wanted = theta | {"inner.lr": rates}
    found = torch.autograd.grad(torch.stack(losses).mean(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True)), hit


@pytest.mark.parametrize("engine", ["program", "autodiff"])
@pytest.mark.parametrize(("head_alone", "first_order"), [(False, False), (True, False), (False, True)])
def test_the_meta_gradient_is_exact(head_alone: bool, first_order: bool, engine: Any) -> None:
    model, tasks = network(), labelled()
    with torch.no_grad():
        model[4].weight *= 6 if head_alone else 2
    clip = 0.25 if head_alone else 0.55  # some gradients are longer and some shorter
    names = ["4.weight", "4.bias"] if head_alone else [n for n, _ in model.named_parameters()]
    rates = torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    learner = fm.MAML(
        model, F.cross_entropy, inner=fm.inner.SGD(rates, momentum=0.6), steps=3, clip_norm=clip, parameters=names,
        engine=engine, first_order=first_order,
    )  # fmt: skip
    wanted, hit = by_hand(model, tasks, rates, names, clip, first_order)
    assert True in hit
    assert False in hit
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
    if engine == "program":
        learner.chunk_size, learner.memory_budget = 2, 1
        with pytest.warns(UserWarning, match="memory_budget is 1 bytes"):
            assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


def test_it_goes_with_plain_steps_and_every_algorithm() -> None:
    model, tasks = network(), labelled()
    short = fm.MAML(model, F.cross_entropy, 0.3, 2, clip_norm=100.0)
    plain = fm.MAML(model, F.cross_entropy, 0.3, 2)
    assert relative_error(short.value_and_grad(tasks)[1], plain.value_and_grad(tasks)[1]) <= EXACT
    learner = fm.Reptile(model, F.cross_entropy, 1.0, 1, clip_norm=1e-3)
    gone = torch.cat([d.flatten(1) for d in learner.adapt(tasks).parameters.values()], 1) - torch.cat(
        [p.detach().flatten() for p in model.parameters()]
    )
    assert gone.norm(dim=1).allclose(torch.full((3,), 1e-3, dtype=torch.float64), rtol=1e-2)


def test_what_does_not_fit_is_refused() -> None:
    for wrong in (0.0, float("inf")):
        with pytest.raises(ValueError, match="MAML: clip_norm must be positive and finite"):
            fm.MAML(network(), F.cross_entropy, clip_norm=wrong)
    with pytest.raises(ValueError, match="MAML: plan must not be 'factored' with clip_norm"):
        fm.MAML(network(), F.cross_entropy, clip_norm=1.0, plan="factored")

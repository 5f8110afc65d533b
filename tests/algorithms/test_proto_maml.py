"""ProtoMAML against an explicit loop whose head starts from prototypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, WAYS, gradients, labelled, network
from tests.oracle import relative_error

BODY = ["0.weight", "0.bias", "2.weight", "2.bias"]


def by_hand(
    model: nn.Sequential, tasks: fm.TaskBatch, lr: Any, steps: int, names: list[str], first_order: bool
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Mean loss attached to the model's parameters, the query outputs, and each task's adapted weights."""
    losses, logits, adapted = [], [], []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        features = model[:-1](xs)
        means = torch.stack([features[ys == n].mean(0) for n in range(WAYS)])
        # what adapts is no longer the tensor that the prototypes are made of
        phi = {n: p.view_as(p) for n, p in model.named_parameters()}
        phi |= {"4.weight": 2 * means, "4.bias": -(means * means).sum(1)}
        for k in range(steps):
            moving = [*names, "4.weight", "4.bias"]
            inner = F.cross_entropy(functional_call(model, phi, (xs,)), ys)
            g = torch.autograd.grad(inner, [phi[n] for n in moving], create_graph=not first_order)
            rate = lr[k] if isinstance(lr, Tensor) else lr
            phi = phi | {n: phi[n] - rate * d for n, d in zip(moving, g, strict=True)}
        logits.append(functional_call(model, phi, (xq,)))
        losses.append(F.cross_entropy(logits[-1], yq))
        adapted.append(phi)
    return torch.stack(losses).mean(), torch.stack(logits), adapted


def truth(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if d is None else d for (n, p), d in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("engine", ["program", "autodiff"])
@pytest.mark.parametrize(("parameters", "steps", "first_order"), [(None, 3, False), (["2.*"], 2, True), ([], 0, False)])
def test_the_meta_gradient_is_exact(steps: int, first_order: bool, parameters: Any, engine: Any) -> None:
    model, tasks = network(), labelled()
    learner = fm.ProtoMAML(
        model, F.cross_entropy, 0.2, steps, parameters=parameters, first_order=first_order, engine=engine, chunk_size=2
    )
    names = BODY if parameters is None else BODY[2:] if parameters else []
    loss, logits, _ = by_hand(model, tasks, 0.2, steps, names, first_order)
    wanted = truth(model, loss)
    value, found = learner.value_and_grad(tasks)
    assert relative_error(value, loss) <= EXACT
    assert relative_error(found, {n: d for n, d in wanted.items() if n in BODY}) <= EXACT
    out = learner(tasks)
    out.loss.backward()
    assert relative_error(out.logits, logits) <= EXACT
    assert relative_error(gradients(model), wanted) <= EXACT
    assert model[4].weight.grad is None
    assert {n for n, _ in learner.named_parameters()} == {f"model.{n}" for n, _ in model.named_parameters()}


def test_rates_are_learned_and_new_weights_are_seen() -> None:
    model, tasks = network(), labelled()
    rates = torch.tensor([0.2, 0.1], dtype=torch.float64, requires_grad=True)
    learner = fm.ProtoMAML(model, F.cross_entropy, rates, 2)
    for _ in range(2):
        loss = by_hand(model, tasks, rates, 2, BODY, False)[0]
        wanted = truth(model, loss)
        (of_rates,) = torch.autograd.grad(by_hand(model, tasks, rates, 2, BODY, False)[0], rates)
        found = learner.value_and_grad(tasks)[1]
        assert relative_error(found.pop("lr"), of_rates) <= EXACT
        assert relative_error(found, {n: wanted[n] for n in BODY}) <= EXACT
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)


def test_adapted_models_have_their_own_head() -> None:
    model, tasks = network(), labelled()
    learner = fm.ProtoMAML(model, F.cross_entropy, 0.2, 3)
    _, logits, phis = by_hand(model, tasks, 0.2, 3, BODY, False)
    adapted = learner.adapt(tasks)
    for name, value in adapted.parameters.items():
        assert relative_error(value, torch.stack([phi[name] for phi in phis])) <= EXACT
    assert relative_error(adapted(tasks.query[0]), logits) <= EXACT
    single = learner.adapt(tasks.task(1)[0])
    assert relative_error(single(tasks.query[0][1]), logits[1]) <= EXACT
    assert relative_error(single.module()(tasks.query[0][1]), logits[1]) <= EXACT


def test_convolutions_with_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, WAYS)).double()
    plain = labelled(features=16)
    tasks = fm.TaskBatch(*[(x.reshape(*x.shape[:2], 1, 4, 4), y) for x, y in (plain.support, plain.query)])
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    before = model[1].running_mean.clone()
    found = fm.ProtoMAML(model, F.cross_entropy, 0.2, 2).value_and_grad(tasks)[1]
    assert torch.equal(model[1].running_mean, before)
    wanted = truth(model, by_hand(model, tasks, 0.2, 2, names, False)[0])
    assert relative_error(found, {n: wanted[n] for n in names}) <= EXACT


def test_what_does_not_fit_is_refused() -> None:
    model, tasks = network(), labelled()
    flat = nn.Sequential(nn.Linear(4, WAYS), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match="ProtoMAML: head must be a Linear with bias, got '3'"):
        fm.ProtoMAML(model, F.cross_entropy, head="3")
    with pytest.raises(TypeError, match="ProtoMAML: lr must be a number or a tensor"):
        fm.ProtoMAML(model, F.cross_entropy, {"4.weight": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ProtoMAML: weight_decay must be 0"):
        fm.ProtoMAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1, weight_decay=0.1))
    with pytest.raises(ValueError, match="ProtoMAML: the model's outputs must be its head's"):
        fm.ProtoMAML(flat, F.cross_entropy, head="0", engine="autodiff")(tasks)
    with pytest.raises(ValueError, match="got none of class 2 in task 0"):
        fm.ProtoMAML(model, F.cross_entropy)(fm.TaskBatch((tasks.support[0], tasks.support[1] % 2), tasks.query))
    tied = network()
    tied[0].bias = tied[2].bias = nn.Parameter(torch.zeros(6))
    with pytest.raises(ValueError, match="ProtoMAML: parameters must not be tied"):
        fm.ProtoMAML(tied, F.cross_entropy)

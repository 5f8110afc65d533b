"""Meta-SGD under learn2learn's names: rates that are learned, one an element."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta.compat.learn2learn as l2l
from tests.compat.learn2learn_cases import MODELS, Tied, assert_equal, explicit, gradients, loop, made, mlp


def test_signatures() -> None:
    meta = l2l.algorithms.MetaSGD
    given = {name: p.default for name, p in inspect.signature(meta).parameters.items()}
    assert given == {"model": inspect.Parameter.empty, "lr": 1.0, "first_order": False, "lrs": None}
    assert list(inspect.signature(meta.adapt).parameters)[1:] == ["loss", "first_order"]
    assert list(inspect.signature(meta.clone).parameters)[1:] == []
    assert list(inspect.signature(l2l.algorithms.meta_sgd_update).parameters) == ["model", "lrs", "grads"]


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradient(name: str, first_order: bool) -> None:
    model, tasks = made(name)
    meta = l2l.algorithms.MetaSGD(model, lr=0.3, first_order=first_order)
    with torch.no_grad():
        for lr in meta.lrs:
            lr.add_(0.1 * torch.randn_like(lr))
    rates = dict(zip([n for n, _ in model.named_parameters()], meta.lrs, strict=True))
    truth = explicit(model, tasks, 3, lambda n, p, g: rates[n] * g, first_order=first_order)
    value = loop(meta, tasks, 3)
    wanted = [*model.parameters(), *meta.lrs]
    assert_equal([value, *gradients(value, wanted)], [truth, *gradients(truth, wanted)])
    assert all(g.norm() > 0 for g in gradients(truth, meta.lrs))


def test_rates_are_parameters_with_their_own_names() -> None:
    model = mlp()
    meta = l2l.algorithms.MetaSGD(model, lr=0.1)
    assert len(list(meta.parameters())) == 2 * len(list(model.parameters()))
    assert all(torch.equal(lr, torch.full_like(p, 0.1)) for lr, p in zip(meta.lrs, model.parameters(), strict=True))
    assert [n for n in meta.state_dict() if n.startswith("lrs")] == [f"lrs.{i}" for i in range(6)]
    given = nn.ParameterList([nn.Parameter(torch.tensor(0.5)) for _ in range(6)])
    assert l2l.algorithms.MetaSGD(model, lrs=given).lrs is given
    assert torch.equal(l2l.algorithms.MetaSGD(model).lrs[0], torch.ones(8, 5))


def test_a_clone_computes_what_the_base_does_and_learns() -> None:
    model, x = mlp(), torch.randn(7, 5)
    meta = l2l.algorithms.MetaSGD(model, lr=0.1)
    clone = meta.clone()
    assert torch.equal(clone(x), model(x))
    loss = clone(x).norm()
    clone.adapt(loss)
    assert clone(x).norm() < loss
    clone(x).norm().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in meta.parameters())


def test_a_clone_of_an_adapted_clone_goes_on() -> None:
    model, tasks = made("mlp")
    meta = l2l.algorithms.MetaSGD(model, lr=0.3)
    (xs, ys), (xq, yq) = tasks[0]
    learner = meta.clone()
    for _ in range(2):
        learner.adapt(F.cross_entropy(learner(xs), ys))
        learner = learner.clone()
    value, truth = F.cross_entropy(learner(xq), yq), loop(meta, tasks[:1], 2)
    assert_equal(gradients(value, meta.parameters()), gradients(truth, meta.parameters()))


def test_one_order_for_one_step() -> None:
    model, tasks = made("mlp")
    (xs, ys), (xq, yq) = tasks[0]
    meta = l2l.algorithms.MetaSGD(model, lr=0.3)
    clone = meta.clone()
    clone.adapt(F.cross_entropy(clone(xs), ys), first_order=True)
    meta.first_order = True
    value, truth = F.cross_entropy(clone(xq), yq), loop(meta, tasks[:1], 1)
    assert_equal(gradients(value, meta.parameters()), gradients(truth, meta.parameters()))


def test_tied_weights_stay_tied() -> None:
    clone = l2l.algorithms.MetaSGD(Tied(), lr=0.1).clone()
    clone.adapt(clone(torch.randn(6, 5)).norm())
    assert clone.module.first.weight is clone.module.second.weight


def test_what_cannot_adapt_is_named() -> None:
    model = mlp()
    clone = l2l.algorithms.MetaSGD(model, lr=0.1).clone()
    with pytest.raises(RuntimeError, match=r"MetaSGD.adapt: loss must be .* 0.bias, 2.weight"):
        clone.adapt(clone.module[0].weight.norm())
    model[0].bias.requires_grad_(False)
    clone = l2l.algorithms.MetaSGD(model, lr=0.1).clone()
    with pytest.raises(RuntimeError, match=r"MetaSGD.adapt: parameters must be .* 0.bias;"):
        clone.adapt(clone(torch.randn(7, 5)).norm())


def test_update() -> None:
    model = mlp()
    rates = [torch.rand_like(p) for p in model.parameters()]
    grads = [torch.randn_like(p) for p in model.parameters()]
    grads[2] = None
    expected = [p if g is None else p - r * g for p, r, g in zip(model.parameters(), rates, grads, strict=True)]
    clone = l2l.clone_module(model)
    assert l2l.algorithms.meta_sgd_update(clone, rates, grads) is clone
    assert_equal(clone.parameters(), expected, 0.0)

    clone = l2l.clone_module(model)  # rates and gradients at the tensors themselves
    for p, r, g in zip(clone.parameters(), rates, grads, strict=True):
        p.grad, p._lr = g, r
    l2l.algorithms.meta_sgd_update(clone)
    assert_equal(clone.parameters(), expected, 0.0)

    base = mlp()
    for p in base.parameters():
        p.grad = torch.ones_like(p)
    held, before = list(base.parameters()), [p.detach().clone() for p in base.parameters()]
    l2l.algorithms.meta_sgd_update(base, rates)
    assert_equal(base.parameters(), [p - r for p, r in zip(before, rates, strict=True)], 0.0)
    assert all(p.grad is None for p in held)  # taken

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"meta_sgd_update: lrs must be given where parameters have no _lr"):
        l2l.algorithms.meta_sgd_update(model)
    with pytest.raises(ValueError, match=r"meta_sgd_update: lrs must be one for each .* 6 parameters, got 5"):
        l2l.algorithms.meta_sgd_update(clone, rates[:-1], grads)
    with pytest.raises(ValueError, match=r"meta_sgd_update: grads must be one for each .* 6 parameters, got 5"):
        l2l.algorithms.meta_sgd_update(clone, rates, grads[:-1])

"""MAML under learn2learn's names: its meta-gradient, its clones, and what it says where learn2learn only prints."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta.compat.learn2learn as l2l
from tests.compat.learn2learn_cases import MODELS, assert_equal, explicit, gradients, loop, made, mlp


def test_signatures() -> None:
    maml = l2l.algorithms.MAML
    assert list(inspect.signature(maml).parameters) == ["model", "lr", "first_order", "allow_unused", "allow_nograd"]
    assert list(inspect.signature(maml.adapt).parameters)[1:] == ["loss", "first_order", "allow_unused", "allow_nograd"]
    assert list(inspect.signature(maml.clone).parameters)[1:] == ["first_order", "allow_unused", "allow_nograd"]
    assert list(inspect.signature(l2l.algorithms.maml_update).parameters) == ["model", "lr", "grads"]


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradient(name: str, first_order: bool) -> None:
    model, tasks = made(name)
    maml = l2l.algorithms.MAML(model, lr=0.3, first_order=first_order)
    parameters = list(model.parameters())
    truth = explicit(model, tasks, 3, lambda _, p, g: 0.3 * g, first_order=first_order)
    expected = gradients(truth, parameters)
    value = loop(maml, tasks, 3)
    assert_equal([value, *gradients(value, parameters)], [truth, *expected])
    other = explicit(model, tasks, 3, lambda _, p, g: 0.3 * g, first_order=not first_order)
    with pytest.raises(AssertionError):  # the two orders do differ here
        assert_equal(gradients(other, parameters), expected)


def test_a_clone_of_an_adapted_clone_goes_on() -> None:
    model, tasks = made("mlp")
    maml = l2l.algorithms.MAML(model, lr=0.3)
    (xs, ys), (xq, yq) = tasks[0]
    learner = maml.clone()
    learner.adapt(F.cross_entropy(learner(xs), ys))
    inner = learner.clone()
    inner.adapt(F.cross_entropy(inner(xs), ys))
    before = [p.detach().clone() for p in learner.parameters()]
    truth = explicit(model, tasks[:1], 2, lambda _, p, g: 0.3 * g)
    value = F.cross_entropy(inner(xq), yq)
    assert_equal([value, *gradients(value, model.parameters())], [truth, *gradients(truth, model.parameters())])
    assert_equal(learner.parameters(), before, 0.0)  # the inner clone's step is its own


def test_orders_may_change_from_step_to_step() -> None:
    model, tasks = made("mlp")
    (xs, ys), (xq, yq) = tasks[0]
    clone = l2l.algorithms.MAML(model, lr=0.3, first_order=True).clone()
    clone.adapt(F.cross_entropy(clone(xs), ys), first_order=False)
    truth = explicit(model, tasks[:1], 1, lambda _, p, g: 0.3 * g)
    value = F.cross_entropy(clone(xq), yq)
    assert_equal(gradients(value, model.parameters()), gradients(truth, model.parameters()))
    assert l2l.algorithms.MAML(model, lr=0.3).clone(first_order=True).first_order


def test_a_rate_that_is_a_parameter_is_learned() -> None:
    model, tasks = made("mlp")
    maml = l2l.algorithms.MAML(model, lr=nn.Parameter(torch.tensor(0.3, dtype=torch.float64)))
    assert "lr" in dict(maml.named_parameters())
    truth = explicit(model, tasks, 2, lambda _, p, g: maml.lr * g)
    value = loop(maml, tasks, 2)
    assert_equal(gradients(value, [maml.lr]), gradients(truth, [maml.lr]))


@pytest.mark.parametrize("first_order", [False, True])
def test_a_clone_computes_what_the_base_does(first_order: bool) -> None:
    model, x = mlp(), torch.randn(7, 5)
    model.register_buffer("extra", torch.zeros(1, 2, 3))
    maml = l2l.algorithms.MAML(model, lr=0.01, first_order=first_order)
    for clone in (maml.clone(), maml.clone()):
        assert torch.equal(clone(x), model(x))


def test_a_clone_is_connected_to_the_base_before_and_after_adaptation() -> None:
    model, x = mlp(), torch.randn(7, 5)
    maml = l2l.algorithms.MAML(model, lr=0.01)
    for steps in (0, 1):
        model.zero_grad()
        clone = maml.clone()
        loss = clone(x).norm()
        if steps:
            clone.adapt(loss)
            assert clone(x).norm() < loss
        clone(x).norm().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


def test_first_order_gradients_are_those_of_the_adapted_weights() -> None:
    model, x = mlp(), torch.randn(7, 5)
    clone = l2l.algorithms.MAML(model, lr=0.01, first_order=True).clone()
    for _ in range(3):
        clone.adapt(clone(x).norm())
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for r, c in zip(reference.parameters(), clone.parameters(), strict=True):
            r.copy_(c)
    reference(x).norm().backward()
    clone(x).norm().backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in reference.parameters()], 1e-8)


def test_unused_parameters_stay_where_that_is_allowed() -> None:
    model = mlp()
    clone = l2l.algorithms.MAML(model, lr=0.1, allow_unused=True).clone()
    used = list(clone.parameters())[::2]
    clone.adapt(sum(p.norm() for p in used))
    for i, (c, p) in enumerate(zip(clone.parameters(), model.parameters(), strict=True)):
        assert torch.equal(c, p) == (i % 2 == 1)
    sum(p.norm() for p in list(clone.parameters())[::2]).backward()
    assert [p.grad is not None for p in model.parameters()] == [True, False] * 3


def test_an_unused_parameter_is_named() -> None:
    clone = l2l.algorithms.MAML(mlp(), lr=0.1).clone()
    loss = clone.module[0].weight.norm()
    with pytest.raises(
        RuntimeError, match=r"MAML.adapt: loss must be .* not use 0.bias, 2.weight.*; pass allow_unused"
    ):
        clone.adapt(loss)
    clone.adapt(loss, allow_unused=True)


def test_frozen_parameters_stay_where_that_is_allowed() -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)
    clone = l2l.algorithms.MAML(model, lr=0.1).clone()
    loss = sum(p.norm() for p in clone.parameters())
    with pytest.raises(RuntimeError, match=r"MAML.adapt: parameters must be .* 2.weight; pass allow_nograd=True"):
        clone.adapt(loss)
    clone.adapt(loss, allow_nograd=True)  # the refusal has left the graph as it was
    sum(p.norm() for p in clone.parameters()).backward()
    assert [p.grad is None for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]

    by_default = l2l.algorithms.MAML(model, lr=0.1, allow_nograd=True)
    assert by_default.allow_unused  # which follows allow_nograd
    assert not l2l.algorithms.MAML(model, lr=0.1, allow_unused=False, allow_nograd=True).allow_unused
    clone = by_default.clone()
    clone.adapt(clone(torch.randn(7, 5)).norm())
    assert torch.equal(clone.module[2].weight, model[2].weight)
    assert not torch.equal(clone.module[0].weight, model[0].weight)


def test_a_loss_without_a_graph_is_refused() -> None:
    clone = l2l.algorithms.MAML(mlp(), lr=0.1).clone()
    with torch.no_grad():
        loss = clone(torch.randn(7, 5)).norm()
    with pytest.raises(
        RuntimeError, match=r"MAML.adapt: loss must be a tensor that depends on the parameters.*forward"
    ):
        clone.adapt(loss)
    l2l.detach_module(clone)
    with pytest.raises(RuntimeError, match="one at least requires grad"):
        clone.adapt(loss, allow_nograd=True)


def test_maml_update() -> None:
    model = mlp()
    clone = l2l.clone_module(model)
    grads = [torch.randn_like(p) for p in model.parameters()]
    grads[1] = None
    assert l2l.algorithms.maml_update(clone, 0.5, grads) is clone
    expected = [p if g is None else p - 0.5 * g for p, g in zip(model.parameters(), grads, strict=True)]
    assert_equal(clone.parameters(), expected, 1e-7)
    with pytest.raises(ValueError, match=r"maml_update: grads must be one for each .* 6 parameters, got 5"):
        l2l.algorithms.maml_update(clone, 0.5, grads[:-1])
    with pytest.raises(ValueError, match=r"maml_update: grads must be .* does not read .grad"):
        l2l.algorithms.maml_update(l2l.clone_module(model), 0.5)
    clone = l2l.clone_module(model)
    clone[0].bias.update = torch.ones(8)
    l2l.algorithms.maml_update(clone, 0.5)
    assert torch.equal(clone[0].bias, model[0].bias + 1)


def test_attributes_are_the_modules_and_the_state_has_its_names() -> None:
    model = mlp()
    model.colour = "blue"
    maml = l2l.algorithms.MAML(model, lr=0.1)
    assert maml.colour == "blue"
    assert maml.clone().colour == "blue"
    assert list(maml.state_dict()) == [f"module.{name}" for name in model.state_dict()]
    with pytest.raises(AttributeError, match="taste"):
        _ = maml.taste


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_learner_can_be_copied(copied) -> None:
    maml = l2l.algorithms.MAML(mlp(), lr=0.1)
    other = copied(maml)
    assert_equal(other.parameters(), maml.parameters(), 0.0)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in maml.parameters()}


def test_repeated_evaluation_keeps_nothing() -> None:
    maml = l2l.algorithms.MAML(mlp(), lr=0.01)
    x = torch.randn(7, 5)

    def evaluate() -> int:
        learner = maml.clone()
        for _ in range(5):
            learner.adapt(learner(x).norm())
        del learner
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()  # nothing may wait for the collector
    try:
        counts = [evaluate() for _ in range(4)]
    finally:
        gc.enable()
    assert counts == counts[:1] * 4

"""Cloning, updating and detaching modules; the small helpers beside them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastmeta.compat.learn2learn as l2l
from tests.compat.learn2learn_cases import Recurrent, Tied, assert_equal, conv, mlp


def test_a_clone_has_its_own_tensors_and_hands_gradients_back() -> None:
    model, x = mlp(), torch.randn(7, 5)
    clone = l2l.clone_module(model)
    assert type(clone) is type(model)
    assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert all(not p.is_leaf for p in clone.parameters())
    clone(x).norm().backward()
    given = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).norm().backward()
    assert_equal(given, [p.grad for p in model.parameters()], 0.0)
    with torch.no_grad():
        model[0].weight.zero_()
    assert clone[0].weight.norm() > 0


def test_descent_on_a_clone_is_descent_on_its_original() -> None:
    model, x = mlp(), torch.randn(7, 5)
    clone = l2l.clone_module(model)
    for module in (model, clone):
        g = torch.autograd.grad(module(x).norm(), list(module.parameters()))
        for p, d in zip(module.parameters(), g, strict=True):
            p.data.sub_(0.01 * d)
    assert_equal(clone.parameters(), model.parameters(), 0.0)


def test_running_statistics_are_shared() -> None:
    model = conv()
    maml = l2l.algorithms.MAML(model, lr=0.1)
    clone = maml.clone()
    mean, x = model[1].running_mean.clone(), torch.randn(6, 2, 6, 6)
    assert clone.module[1].running_mean is model[1].running_mean
    passes = [model[0](x).mean((0, 2, 3)).detach()]
    loss = clone(x).norm()
    clone.adapt(loss)
    passes.append(clone.module[0](x).mean((0, 2, 3)).detach())
    clone(x)
    for seen in passes:
        mean = 0.9 * mean + 0.1 * seen
    assert torch.allclose(model[1].running_mean, mean, atol=1e-7)
    assert int(model[1].num_batches_tracked) == 2
    assert clone.module[1].running_mean is model[1].running_mean


def test_a_buffer_is_cloned_if_it_requires_grad() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("fixed", torch.zeros(2))
    model.register_buffer("learned", torch.ones(2, requires_grad=True))
    model.register_buffer("none", None)
    clone = l2l.clone_module(model)
    assert clone.fixed is model.fixed
    assert clone.learned is not model.learned
    assert clone.none is None
    clone.learned.update = torch.ones(2)
    l2l.update_module(clone)
    assert torch.equal(clone.learned, torch.full((2,), 2.0))
    clone.learned.sum().backward()
    assert torch.equal(model.learned.grad, torch.ones(2))
    l2l.detach_module(clone, keep_requires_grad=True)
    assert clone.learned.is_leaf
    assert clone.learned.requires_grad


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    clone = l2l.clone_module(model)
    updates = [torch.randn_like(p) for p in model.parameters()]
    for _ in range(2):
        assert len(list(clone.parameters())) == len(list(model.parameters()))
        assert clone.first.weight is clone.second.weight
        assert clone.again.bias is clone.first.bias
        l2l.update_module(clone, updates)
    for p, c, u in zip(model.parameters(), clone.parameters(), updates, strict=True):
        assert torch.allclose(c, p + 2 * u)


def test_a_memo_ties_modules_that_are_cloned_one_by_one() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    memo: dict = {}
    a, b = l2l.clone_module(first, memo), l2l.clone_module(second, memo=memo)
    assert a.weight is b.weight
    assert a.bias is not b.bias


def test_what_is_no_module_is_left_as_it_is() -> None:
    model = nn.Module()
    model.parts = nn.ModuleList([nn.Linear(2, 1), None, nn.Linear(1, 1)])
    clone = l2l.clone_module(model)
    l2l.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    l2l.detach_module(clone)
    assert [part is None for part in clone.parts] == [False, True, False]
    assert torch.equal(clone.parts[2].bias, model.parts[2].bias + 1)
    assert l2l.clone_module(3) == 3


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_use_what_they_were_given(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(1)
    model, x = kind(2, 3), torch.randn(30, 5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml = l2l.algorithms.MAML(model, lr=0.01)
        optimizer = torch.optim.SGD(maml.parameters(), lr=0.01)
        losses = []
        for _ in range(2):
            learner = maml.clone()
            for _ in range(3):
                loss = learner(x)[0].norm()
                losses.append(loss.item())
                learner.adapt(loss)
            optimizer.zero_grad()
            learner(x)[0].norm().backward()
            optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    assert losses[3] < losses[0]


def test_a_module_that_flattens_by_itself_is_asked_to() -> None:
    class Flattening(nn.Linear):
        flattened = 0

        def flatten_parameters(self) -> None: ...

        def _apply(self, fn, recurse=True):
            self.flattened += 1
            return self

    clone = l2l.clone_module(Flattening(2, 2))
    assert clone.flattened == 1
    l2l.update_module(clone, [None, None])
    assert clone.flattened == 2


def test_updates_must_be_one_a_parameter() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"update_module: updates must be one for each .* 6 parameters, got 7; their order"
    ):
        l2l.update_module(model, [None] * 7)
    before = list(model.parameters())
    assert l2l.update_module(model, [None] * 6) is model
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


def test_detaching() -> None:
    clone, x = l2l.clone_module(Recurrent()), torch.randn(6, 5, 4)
    frozen = l2l.clone_module(nn.Linear(2, 2).requires_grad_(False))
    l2l.detach_module(frozen, keep_requires_grad=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    l2l.detach_module(clone, keep_requires_grad=True)
    assert all(p.is_leaf and p.requires_grad for p in clone.parameters())
    clone(x).norm().backward()
    assert all(p.grad is not None for p in clone.parameters())
    l2l.detach_module(clone)
    assert all(not p.requires_grad for p in clone.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        clone(x).norm().backward()


def test_clones_of_lists_and_mappings() -> None:
    p = torch.ones(3, requires_grad=True)
    (a,), b = l2l.clone_parameters([p]), l2l.clone_named_parameters({"p": p})["p"]
    assert len({id(p), id(a), id(b)}) == 3
    (a + 2 * b).sum().backward()
    assert torch.equal(p.grad, torch.full((3,), 3.0))


def test_magic_box_is_one_whose_derivatives_are_not() -> None:
    x = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.equal(l2l.magic_box(x), torch.ones(2, dtype=torch.float64))
    (first,) = torch.autograd.grad(l2l.magic_box(x**2).sum(), x, create_graph=True)
    assert torch.allclose(first, 2 * x)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(second, 4 * x**2 + 2)
    assert l2l.magic_box(0.5) == 0.5


def test_accuracy() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert l2l.utils.accuracy(scores, torch.tensor([1, 0, 0, 0])).item() == 0.75


def test_names() -> None:
    import fastmeta.compat

    assert fastmeta.compat.learn2learn is l2l
    assert all(hasattr(l2l, name) for name in l2l.__all__)
    with pytest.raises(AttributeError, match=r"got 'vision'; fastmeta.tasks has Omniglot"):
        _ = l2l.vision
    with pytest.raises(AttributeError, match="got 'nothing'"):
        _ = l2l.nothing

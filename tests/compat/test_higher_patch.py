"""Patched modules: fast weights, their history, and what they share with the original."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastmeta.compat.higher as higher
from tests.compat.models import batches, mixed, perceptron, squared


def test_the_copy_is_the_module_and_leaves_it_alone() -> None:
    model, kept = mixed(), copy.deepcopy(mixed())
    (x, _), (other, _) = batches(2)
    patched = higher.monkeypatch(model)
    assert isinstance(patched, type(model))
    assert type(patched).__name__ == "FunctionalMixed"
    assert [n for n, _ in patched.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in patched.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert list(patched.state_dict()) == list(model.state_dict())
    for p, q in zip(patched.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.is_leaf
        assert p.requires_grad
        assert p.data_ptr() != q.data_ptr()
    torch.testing.assert_close(patched(x), kept(x), rtol=0, atol=0)
    torch.testing.assert_close(patched(other), kept(other), rtol=0, atol=0)
    assert torch.equal(patched.norm.running_mean, kept.norm.running_mean)
    assert model.norm.num_batches_tracked == 0
    assert not model.norm.running_mean.any()


def test_eval_mode_and_a_change_of_mode() -> None:
    model = mixed().eval()
    (x, _), *_ = batches(1)
    patched = higher.monkeypatch(model)
    torch.testing.assert_close(patched(x), model(x), rtol=0, atol=0)
    patched.train()
    assert not model.training
    patched(x)
    assert not model.norm.running_mean.any()


def test_gradients_reach_the_original_weights_only_without_a_copy() -> None:
    model = perceptron()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    patched = higher.monkeypatch(model, copy_initial_weights=False)
    found = torch.autograd.grad(patched(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    apart = higher.monkeypatch(model)
    assert not any(
        g is not None for g in torch.autograd.grad(apart(x).square().sum(), list(model.parameters()), allow_unused=True)
    )


def test_outputs_and_gradients_are_the_same_bits_in_float32() -> None:
    model = mixed().float()
    (x, y), *_ = batches(1)
    patched = higher.monkeypatch(model)
    outputs = patched(x.float())
    assert torch.equal(outputs, model(x.float()))
    ours = torch.autograd.grad(squared(outputs, y.float()), list(patched.parameters()), allow_unused=True)
    loss = squared(model(x.float()), y.float())
    theirs = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_params_of_a_call_become_the_latest() -> None:
    model = mixed()
    (x, _), *_ = batches(1)
    patched = higher.monkeypatch(model)
    new = [p.detach() + 0.1 for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    expected = functional_call(copy.deepcopy(model), dict(zip(names, new, strict=True)), x)
    torch.testing.assert_close(patched(x, params=new), expected)
    assert all(a is b for a, b in zip(patched.parameters(), new, strict=True))
    assert len(patched._fast_params) == 2
    assert all(torch.equal(a, b) for a, b in zip(patched.parameters(time=0), model.parameters(), strict=True))


def test_a_submodule_may_be_called_with_and_without_params() -> None:
    model = perceptron()
    patched = higher.monkeypatch(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(patched[0](x), model[0](x))
    new = [2 * p for p in patched.parameters()]
    torch.testing.assert_close(patched[0](x, params=new), 2 * model[0](x))
    torch.testing.assert_close(patched[0](x), 2 * model[0](x))


def test_make_functional_has_no_weights_of_its_own() -> None:
    model = mixed()
    (x, _), *_ = batches(1)
    stateless = higher.make_functional(model)
    assert stateless.fast_params is None
    with pytest.raises(ValueError, match="params must be given"):
        stateless(x)
    with pytest.raises(RuntimeError, match="no fast weights"):
        stateless.parameters()
    torch.testing.assert_close(stateless(x, params=list(model.parameters())), copy.deepcopy(model)(x))
    seen = []
    higher.make_functional(model, encapsulator=lambda patched, original: seen.append((patched, original)))
    assert seen[0][1] is model


def test_history() -> None:
    model = perceptron()
    patched = higher.monkeypatch(model)
    first = patched.fast_params
    second, third = ([p + i for p in first] for i in (1.0, 2.0))
    patched.update_params(second)
    patched.fast_params = iter(third)
    assert patched.init_fast_params is first
    for time, expected in [(0, first), (1, second), (2, third), (-1, third), (-3, first), (None, third)]:
        assert all(a is b for a, b in zip(patched.parameters(time=time), expected, strict=True))
        named = dict(patched.named_parameters(time=time))
        assert list(named) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert all(a is b for a, b in zip(named.values(), expected, strict=True))
    assert patched[2].weight is third[2]
    assert dict(patched.named_parameters(prefix="net"))["net.0.bias"] is third[1]
    assert [n for n, _ in patched.named_parameters(recurse=False)] == []
    with pytest.raises(IndexError, match="time must be below 3"):
        patched.parameters(time=3)
    with pytest.warns(UserWarning, match="recurse=False"):
        assert len(list(patched.parameters(recurse=False))) == 4


def test_no_history_without_tracking() -> None:
    patched = higher.monkeypatch(perceptron(), track_higher_grads=False)
    new = [p.detach() for p in patched.parameters()]
    patched.update_params(new)
    assert patched.fast_params == new
    assert len(patched._fast_params) == 1
    assert all(a is b for a, b in zip(patched.parameters(time=0), new, strict=True))
    with pytest.raises(ValueError, match="without track_higher_grads"):
        patched.parameters(time=1)
    with pytest.raises(RuntimeError, match="track_higher_grads"):
        _ = patched.init_fast_params
    with pytest.raises(ValueError, match="a bool"):
        patched.track_higher_grads = 1
    patched.track_higher_grads = True
    patched.update_params(new)
    assert len(patched._fast_params) == 2


def test_turning_tracking_off_midway_still_takes_the_latest_weights() -> None:
    patched = higher.monkeypatch(perceptron())
    patched.update_params([p + 1 for p in patched.parameters()])
    patched.track_higher_grads = False
    new = [p + 1 for p in patched.parameters()]
    patched.update_params(new)
    assert all(a is b for a, b in zip(patched.fast_params, new, strict=True))


def test_a_weight_may_be_assigned() -> None:
    model = mixed()
    patched = higher.monkeypatch(model)
    weight = torch.zeros(5, 5, dtype=torch.float64)
    patched.tied.weight = weight
    assert patched.rest[0].weight is weight  # they are one
    assert patched.tied.weight is weight
    assert sum(p is weight for p in patched.parameters()) == 1
    assert len(patched._fast_params) == 2
    with pytest.raises(TypeError, match="a fast weight"):
        patched.tied.weight = 3
    patched.note = "any"
    assert not hasattr(model, "note")


def test_hooks_of_the_original_stay_there_and_new_ones_run() -> None:
    model, seen = perceptron(), []
    model[0].register_forward_hook(lambda *_: seen.append("original"))
    model.register_forward_pre_hook(lambda *_: seen.append("original"))
    patched = higher.monkeypatch(model)
    patched[0].register_forward_hook(lambda m, *_: seen.append(m.weight is patched[0].weight))
    patched.register_forward_pre_hook(lambda *_: seen.append("before"))
    patched(torch.zeros(1, 3, dtype=torch.float64))
    assert seen == ["before", True]


def test_a_module_that_stands_twice_stays_one() -> None:
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Linear(3, 3), shared).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    patched = higher.monkeypatch(model)
    assert patched[0] is patched[2]
    patched(x)
    model(x)
    assert torch.equal(patched[0].running_mean, model[0].running_mean)


def test_attributes_that_hold_modules_hold_the_patched_ones() -> None:
    model = perceptron()
    model.plain = {"first": [model[0]], "text": "as it is"}
    model.other = nn.Sequential(model[2], nn.ReLU())
    model.steps = steps = [1, 2]
    model.twice = types.MethodType(lambda self, x: self[0](x) * 2, model)
    model.missing = None
    patched = higher.monkeypatch(model)
    assert patched.plain["first"][0] is patched[0]
    assert patched.other[0] is patched[2]
    assert patched.steps is steps
    x = torch.ones(1, 3, dtype=torch.float64)
    patched.update_params([0 * p for p in patched.parameters()])
    assert not patched.twice(x).any()


def test_modules_that_would_keep_original_weights_raise() -> None:
    model = perceptron()
    model.listed = list(model.parameters())
    with pytest.raises(ValueError, match=r"Sequential.listed must not hold parameters.*ParameterList"):
        higher.monkeypatch(model)
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="parametrizations"):
        higher.monkeypatch(normed)
    with pytest.raises(ValueError, match="patched already"):
        higher.monkeypatch(higher.monkeypatch(perceptron()))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(higher.monkeypatch(perceptron()))
    with pytest.raises(ValueError, match="must be 4 tensors, got 1"):
        higher.monkeypatch(perceptron()).update_params([torch.zeros(1)])


def test_parametrizations_and_parameter_lists() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.ones(3), torch.ones(3)])
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
            self.add_module("nothing", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for w in self.weights:
                x = x * w
            return self.normed(x)

    torch.manual_seed(0)
    model = Listed().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    patched = higher.monkeypatch(model, copy_initial_weights=False)
    torch.testing.assert_close(patched(x), model(x))
    ours = torch.autograd.grad(patched(x).square().sum(), list(model.parameters()))
    theirs = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert all(map(torch.equal, ours, theirs))
    patched.update_params([2 * p for p in patched.parameters()])
    assert not torch.allclose(patched(x), model(x))


def test_multi_head_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    patched = higher.monkeypatch(model)
    torch.testing.assert_close(patched(x), model(x))
    patched.update_params([p * 1.5 for p in patched.parameters()])
    expected = functional_call(model, {n: p * 1.5 for n, p in model.named_parameters()}, x)
    torch.testing.assert_close(patched(x), expected)


def test_buffer_sync() -> None:
    model = mixed()
    patched = higher.monkeypatch(model)
    (x, _), *_ = batches(1)
    model(x)
    higher.patch.buffer_sync(model, patched)
    assert torch.equal(patched.norm.running_mean, model.norm.running_mean)
    assert patched.norm.running_mean is not model.norm.running_mean
    with pytest.raises(KeyError, match=r"no submodule .first."):
        higher.patch.buffer_sync(model, perceptron())


def test_get_func_params_and_flatten() -> None:
    model = perceptron()
    model[0].bias.requires_grad_(False)
    copies = higher.utils.get_func_params(model)
    assert [p.requires_grad for p in copies] == [True, False, True, True]
    assert all(map(torch.equal, copies, model.parameters()))
    shared = higher.get_func_params(model, safe_copy=False)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(shared, model.parameters(), strict=True))
    assert higher.flatten({"a": [1, (2, 3)], "b": 4}) == [1, 2, 3, 4]


def test_a_patched_module_dies_with_its_last_name() -> None:
    """Without the garbage collector: nothing in it goes round in a circle."""
    gc.collect()
    gc.disable()
    try:
        patched = higher.monkeypatch(mixed())
        (x, y), *_ = batches(1)
        loss = squared(patched(x), y)
        gone = weakref.ref(patched.fast_params[0])
        del patched, loss
        assert gone() is None
    finally:
        gc.enable()

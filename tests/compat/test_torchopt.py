"""TorchOpt's names: meta-optimizers against explicit loops, functional optimizers, snapshots."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import fastmeta.compat.torchopt as torchopt
from tests.compat.models import batches, close, flat, mixed, perceptron, slope, squared, two_steps_with_momentum

Meta = Callable[[nn.Module], torchopt.MetaOptimizer]

PAIRS: dict[str, tuple[Meta, Callable[[list[Tensor]], optim.Optimizer]]] = {
    "sgd": (lambda m: torchopt.MetaSGD(m, lr=0.1), lambda p: optim.SGD(p, lr=0.1)),
    "momentum": (
        lambda m: torchopt.MetaSGD(m, 0.1, 0.9, 0.05, 0.2),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, dampening=0.2),
    ),
    "nesterov": (
        lambda m: torchopt.MetaSGD(m, 0.1, momentum=0.9, nesterov=True, maximize=True),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    ),
    "adam": (
        lambda m: torchopt.MetaAdam(m, 0.05, (0.8, 0.9), 1e-3, 0.1, maximize=True),
        lambda p: optim.Adam(p, lr=0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, maximize=True),
    ),
    "adamw": (
        lambda m: torchopt.MetaAdamW(m, 0.05, eps=1e-3, weight_decay=0.1),
        lambda p: optim.AdamW(p, lr=0.05, eps=1e-3, weight_decay=0.1),
    ),
    "radam": (
        lambda m: torchopt.MetaRAdam(m, 0.05, (0.8, 0.7), 1e-3, 0.1),
        lambda p: optim.RAdam(p, lr=0.05, betas=(0.8, 0.7), eps=1e-3, weight_decay=0.1),
    ),
    "adamax": (
        lambda m: torchopt.MetaAdamax(m, 0.05, weight_decay=0.1),
        lambda p: optim.Adamax(p, lr=0.05, weight_decay=0.1),
    ),
    "adadelta": (
        lambda m: torchopt.MetaAdaDelta(m, 0.5, eps=1e-3, weight_decay=0.1),
        lambda p: optim.Adadelta(p, lr=0.5, eps=1e-3, weight_decay=0.1),
    ),
    "adagrad": (
        lambda m: torchopt.MetaAdaGrad(m, 0.1, 0.2, 0.1, 0.3, 1e-3),
        lambda p: optim.Adagrad(p, 0.1, 0.2, 0.1, 0.3, 1e-3),
    ),
    "rmsprop": (
        lambda m: torchopt.MetaRMSProp(m, 0.02, 0.9, 1e-3, 0.1),
        lambda p: optim.RMSprop(p, 0.02, 0.9, 1e-3, 0.1),
    ),
    "centred": (
        lambda m: torchopt.MetaRMSprop(m, 0.02, eps=1e-3, momentum=0.5, centered=True),
        lambda p: optim.RMSprop(p, 0.02, eps=1e-3, momentum=0.5, centered=True),
    ),
}
NAMES = [n for n in torchopt.__all__ if n not in ("optim", "transform", "utils")]


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_torch(
    model: nn.Module, make: Callable[[list[Tensor]], optim.Optimizer], shift: list[Tensor]
) -> tuple[float, Tensor]:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p, d in zip(model.parameters(), shift, strict=True):
            p += d
    optimizer = make(list(model.parameters()))
    *support, query = batches(5, 3)
    for x, y in support:
        optimizer.zero_grad()
        squared(model(x), y).backward()
        optimizer.step()
    return squared(model(query[0]), query[1]).item(), flat([p.detach() for p in model.parameters()])


@pytest.mark.parametrize("name", PAIRS)
def test_the_meta_gradient_is_the_derivative_of_torch_optims_steps(name: str) -> None:
    meta, make = PAIRS[name]
    model = perceptron()
    original, start = copy.deepcopy(model), list(model.parameters())
    inner = meta(model)
    *support, query = batches(5, 3)
    for x, y in support:
        assert inner.step(squared(model(x), y)) is None
    assert all(p.grad_fn is not None for p in model.parameters())
    loss = squared(model(query[0]), query[1])
    gradient = torch.autograd.grad(loss, start)
    expected, adapted = by_torch(original, make, [torch.zeros_like(p) for p in start])
    close(flat([p.detach() for p in model.parameters()]), adapted, 1e-12)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        direction = [torch.randn(p.shape, generator=generator) for p in start]
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        assert along.item() == pytest.approx(
            slope(lambda h, direction=direction: by_torch(original, make, [h * d for d in direction])[0]),
            rel=1e-7,
            abs=1e-9,
        )


@pytest.mark.parametrize("eps_root", [0.0, 0.1])
def test_learned_hyper_parameters_of_adam_against_an_explicit_loop(eps_root: float) -> None:
    model, data = perceptron(), batches(4, 3)
    names, start = [n for n, _ in model.named_parameters()], list(model.parameters())
    lr, beta1, beta2, eps = (torch.tensor(v, requires_grad=True) for v in (0.05, 0.8, 0.9, 1e-3))

    def loss(p: list[Tensor], k: int) -> Tensor:
        return squared(torch.func.functional_call(original, dict(zip(names, p, strict=True)), data[k][0]), data[k][1])

    original = copy.deepcopy(model)
    p, m, v = start, [0.0] * 4, [0.0] * 4
    for t in range(1, 4):
        gradients = torch.autograd.grad(loss(p, t - 1), p, create_graph=True)
        for i, g in enumerate(gradients):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            root = (v[i] / (1 - beta2**t) + eps_root).sqrt()
            p = [*p[:i], p[i] - lr * m[i] / (1 - beta1**t) / (root + eps), *p[i + 1 :]]
    expected = torch.autograd.grad(loss(p, 3), [*start, lr, beta1, beta2, eps])
    inner = torchopt.MetaAdam(model, lr, (beta1, beta2), eps, eps_root=eps_root)
    for x, y in data[:3]:
        inner.step(squared(model(x), y))
    found = torch.autograd.grad(squared(model(data[3][0]), data[3][1]), [*start, lr, beta1, beta2, eps])
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)


def test_tasks_start_from_snapshots() -> None:
    """The loop of TorchOpt's MAML example, against gradients of each task alone; batch norm, ties and an LSTM in it."""
    model = mixed()
    parameters = list(model.parameters())
    inner = torchopt.MetaSGD(model, lr=0.1, momentum=0.5, dampening=0.3)
    start = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
    rule = torchopt.extract_state_dict(inner, by="reference")
    data, alone = batches(6), []
    for t in range(3):
        for _ in range(2):
            inner.step(squared(model(data[2 * t][0]), data[2 * t][1]))
        assert model.tied.weight is model.rest[0].weight
        assert len(inner.state_dict()[0]) == len(parameters)
        squared(model(data[2 * t + 1][0]), data[2 * t + 1][1]).backward()
        torchopt.recover_state_dict(model, start)
        torchopt.recover_state_dict(inner, rule)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert model.norm.num_batches_tracked == 0
        alone.append(two_steps_with_momentum(mixed(), data[2 * t], data[2 * t + 1]))
    for p, parts in zip(parameters, zip(*alone, strict=True), strict=True):
        given = [g for g in parts if g is not None]
        assert (p.grad is None) == (not given)
        if given and p is not model.first.bias:  # which batch norm makes a constant
            close(p.grad, sum(given))


def test_schedules_count_from_zero() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    seen = []
    inner = torchopt.MetaSGD(model, lr=lambda t: seen.append(int(t)) or 0.1 * 0.5**t)
    for _ in range(3):
        inner.step(model.weight.sum())
    close(model.weight, torch.full((1, 1), 1 - 0.1 - 0.05 - 0.025))
    assert seen == [0, 1, 2]


def test_groups_frozen_and_unused_parameters() -> None:
    one, two = perceptron(), perceptron()
    one[0].weight.requires_grad_(False)
    one.unused = nn.Parameter(torch.ones(1))
    frozen, unused = one[0].weight, one.unused
    inner = torchopt.MetaAdam(one, lr=0.1, weight_decay=0.1)
    inner.add_param_group(two)
    x, y = batches(1, 3)[0]
    before = [one[0].bias, two[0].bias]
    inner.step(squared(one(x), y))
    assert one[0].weight is frozen
    assert one.unused is unused
    assert [one[0].bias is before[0], two[0].bias is before[1]] == [False, True]
    inner.step(squared(two(x), y))
    assert two[0].bias is not before[1]
    assert len(inner.state_dict()) == 2
    with pytest.raises(ValueError, match="depends on none"):
        inner.step(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(ValueError, match="depends on none"):
        torchopt.MetaSGD(nn.Linear(1, 1).requires_grad_(False), lr=0.1).step(torch.ones((), requires_grad=True) * 2)
    with pytest.raises(ValueError, match="of 2 groups, got 1"):
        inner.load_state_dict(inner.state_dict()[:1])
    with pytest.raises(TypeError, match=r"GradientTransformation, such as adam\(\), got float"):
        torchopt.MetaOptimizer(one, 0.1)


@pytest.mark.parametrize("name", PAIRS)
def test_second_moments_of_zero(name: str) -> None:
    model, data = perceptron(), batches(4, 3)
    for x, _ in data:
        x[:, 0] = 0
    start, inner = list(model.parameters()), PAIRS[name][0](model)
    for x, y in data[:3]:
        inner.step(squared(model(x), y))
    gradients = torch.autograd.grad(squared(model(data[3][0]), data[3][1]), start)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_functional_optimizers() -> None:
    params = {"w": torch.ones(2, requires_grad=True), "rest": [torch.ones(3, requires_grad=True)]}
    loss = params["w"].pow(2).sum() + 3 * params["rest"][0].sum()
    impl = torchopt.chain(torchopt.sgd(1.0, momentum=0.5), torchopt.sgd(0.1))
    state = impl.init(params)
    grads = {"w": torch.autograd.grad(loss, params["w"], create_graph=True)[0], "rest": [None]}
    updates, after = impl.update(grads, state, params=params, inplace=False)
    assert updates["rest"] == [None]
    close(updates["w"], torch.full((2,), 0.2))  # the sign turns twice
    assert state is not after
    moved = torchopt.apply_updates(params, updates, inplace=False)
    assert moved["rest"][0] is params["rest"][0]
    close(torch.autograd.grad(moved["w"].sum(), params["w"])[0], torch.full((2,), 1.2))
    assert torchopt.apply_updates(params, {"w": updates["w"], "rest": [None]})["w"] is params["w"]
    close(params["w"].detach(), torch.full((2,), 1.2))
    with pytest.raises(ValueError, match="a tuple of 2, got 1"):
        impl.update(grads, state[:1], params=params)
    assert torchopt.sgd(0.1).chain(torchopt.adam()).init([params["w"]])[1][0].rule.step == 0


def test_func_optimizer() -> None:
    p = (torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True))
    outer = torchopt.FuncOptimizer(torchopt.adam(lr=0.1, weight_decay=0.1))
    first = outer.step(p[0].pow(3).sum(), p)
    assert type(first) is tuple
    assert first[1] is p[1]
    second = outer.step(first[0].pow(3).sum(), first)
    theirs = torch.ones(3, requires_grad=True)
    reference = optim.Adam([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        reference.zero_grad()
        theirs.pow(3).sum().backward()
        reference.step()
    close(second[0].detach(), theirs.detach(), 1e-12)
    assert torch.autograd.grad(second[0].sum(), p[0])[0].abs().sum() > 0
    kept = outer.state_dict()
    again = outer.step(second[0].sum(), second)
    outer.load_state_dict(kept)
    assert torch.equal(outer.step(second[0].sum(), second)[0], again[0])
    leaf = [torch.ones(2, requires_grad=True)]
    inplace = torchopt.FuncOptimizer(torchopt.adam(lr=0.1, weight_decay=0.1), inplace=True)
    for _ in range(2):
        assert inplace.step(leaf[0].pow(2).sum(), leaf)[0] is leaf[0]
    assert leaf[0].is_leaf
    assert not inplace.state_dict()[0].rule.exp_avg.requires_grad
    with pytest.raises(TypeError, match="GradientTransformation"):
        torchopt.FuncOptimizer(torch.optim.SGD)


def test_clip_grad_norm_is_differentiated() -> None:
    p = torch.tensor([3.0, 4.0], requires_grad=True)
    clip = torchopt.clip_grad_norm(1.0)

    def clipped(p: Tensor) -> Tensor:
        return clip.update([p * 2, None], clip.init(None))[0][0]

    close(clipped(p).detach(), torch.tensor([0.6, 0.8]), 1e-6)
    assert torch.autograd.gradcheck(clipped, p)
    close(torchopt.clip_grad_norm(1.0, float("inf")).update([p], ())[0][0], torch.tensor([0.75, 1.0]), 1e-6)
    close(torchopt.clip_grad_norm(9.0).update([p], ())[0][0], p)
    with pytest.raises(RuntimeError, match="must be finite, got nan"):
        torchopt.clip_grad_norm(1.0, error_if_nonfinite=True).update([p * torch.nan], ())


def test_a_chain_in_a_meta_optimizer() -> None:
    """Clipping, then Adam; its values against ``torch``'s own two, its gradient against differences."""
    support, query = batches(2, 3)

    def by_torch_clipped(h: float) -> float:
        model = perceptron()
        with torch.no_grad():
            model[0].weight += h
        optimizer = optim.Adam(model.parameters(), lr=0.1, eps=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            squared(model(support[0]), support[1]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
        return squared(model(query[0]), query[1]).item()

    model = perceptron()
    start = model[0].weight
    impl = torchopt.chain(torchopt.clip_grad_norm(0.3), torchopt.adam(0.1, eps=1e-2))
    inner = torchopt.MetaOptimizer(model, impl)
    for _ in range(3):
        inner.step(squared(model(support[0]), support[1]))
    loss = squared(model(query[0]), query[1])
    assert loss.item() == pytest.approx(by_torch_clipped(0.0), rel=1e-12)
    along = torch.autograd.grad(loss, start)[0].sum()
    assert along.item() == pytest.approx(slope(by_torch_clipped), rel=1e-7)
    functional = torchopt.FuncOptimizer(impl)
    (moved,) = functional.step(start.pow(2).sum(), [start])
    assert moved.grad_fn is not None


def test_the_mask_of_decoupled_decay() -> None:
    p = [torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)]
    for mask in ([True, False], lambda params: [q.ndim > 1 for q in params]):
        impl = torchopt.adamw(lr=0.5, weight_decay=0.1, mask=mask)
        (first, second), _ = impl.update([torch.zeros_like(q) for q in p], impl.init(p), params=p)
        assert torch.equal(first, torch.full((2, 2), -0.05))
        assert not second.any()
    with pytest.raises(ValueError, match="a tree of 2 leaves"):
        torchopt.adamw(mask=[True]).update(p, torchopt.adamw().init(p), params=p)


def test_moments_may_require_grad() -> None:
    p = [torch.ones(2, requires_grad=True)]
    state = torchopt.adam(moment_requires_grad=True).init(p)[0].rule
    assert state.exp_avg.requires_grad
    assert state.exp_avg_sq.is_leaf
    assert not torchopt.adam().init(p)[0].rule.exp_avg.requires_grad
    moment = state.exp_avg
    updates, _ = torchopt.adam(lr=0.1, betas=(0.5, 0.5)).update(
        [torch.ones(2)], torchopt.adam(moment_requires_grad=True).init(p)
    )
    assert updates[0].requires_grad
    assert moment.grad is None


@pytest.mark.parametrize("by", ["reference", "ref", "copy", "clone", "deepcopy", "deepclone"])
def test_modes_of_snapshots(by: str) -> None:
    model = mixed()
    inner = torchopt.MetaAdam(model, lr=0.1)
    x, y = batches(1)[0]
    inner.step(squared(model(x), y))
    state, rule = torchopt.extract_state_dict(model, by=by), torchopt.extract_state_dict(inner, by=by)
    tensors = {**state.params[1], **state.buffers[0]}
    assert set(tensors) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    weight, moment = state.params[1]["weight"], rule[0][1].rule.exp_avg
    assert torch.equal(weight, model.first.weight)
    same = by in ("reference", "ref")
    assert (weight is model.first.weight) == same
    assert (weight.data_ptr() == model.first.weight.data_ptr()) == same
    assert (weight.grad_fn is None) == (by in ("deepcopy", "deepclone"))
    assert weight.requires_grad
    assert (moment is inner.state_dict()[0][1].rule.exp_avg) == same
    tied = [content["weight"] for content in state.params if "weight" in content and content["weight"].shape == (5, 5)]
    assert tied[0] is tied[1]
    inner.step(squared(model(x), y))
    torchopt.recover_state_dict(model, state)
    torchopt.recover_state_dict(inner, rule)
    assert model.first.weight is weight
    assert model.tied.weight is model.rest[0].weight
    assert inner.state_dict()[0][1].rule.exp_avg is moment
    assert list(model.state_dict()) == list(mixed().state_dict())


def test_parameters_stay_parameters_in_deep_copies() -> None:
    model = perceptron()
    model[0].bias.requires_grad_(False)
    state = torchopt.extract_state_dict(model, by="deepcopy", with_buffers=False)
    assert state.buffers == ()
    assert all(isinstance(p, nn.Parameter) for content in state.params for p in content.values())
    assert [p.requires_grad for content in state.params for p in content.values()] == [True, False, True, True]
    visual = torchopt.extract_state_dict(model, enable_visual=True, visual_prefix="net.").visual_contents
    assert visual[model[2].weight] == "net.2.weight"


def test_snapshots_of_others_raise() -> None:
    model = perceptron()
    with pytest.raises(ValueError, match="by must be one of 'reference'"):
        torchopt.extract_state_dict(model, by="view")
    with pytest.raises(TypeError, match="a module or a MetaOptimizer, got list"):
        torchopt.extract_state_dict([])
    with pytest.raises(TypeError, match="a module or a MetaOptimizer, got list"):
        torchopt.recover_state_dict([], torchopt.extract_state_dict(model))
    with pytest.raises(TypeError, match="the ModuleState of a module, got tuple"):
        torchopt.recover_state_dict(model, ())
    with pytest.raises(ValueError, match="the same params"):
        torchopt.recover_state_dict(model, torchopt.extract_state_dict(nn.Linear(2, 2)))


def test_stop_gradient() -> None:
    model = perceptron()
    inner = torchopt.MetaAdam(model, lr=0.1)
    x, y = batches(1, 3)[0]
    inner.step(squared(model(x), y))
    weight, moment = model[0].weight, inner.state_dict()[0][0].rule.exp_avg
    assert weight.grad_fn is not None
    torchopt.stop_gradient(model)
    assert model[0].weight is weight
    assert weight.is_leaf
    assert weight.requires_grad
    torchopt.stop_gradient(inner)
    assert moment.is_leaf
    inner.step(squared(model(x), y))
    state = torchopt.extract_state_dict(model)
    assert torchopt.module_detach_(state) is state
    torchopt.stop_gradient({"any": [model[0].bias * 2, 3]})
    assert all(p.is_leaf for p in model.parameters())


@pytest.mark.parametrize("by", ["reference", "copy", "deepcopy"])
def test_clones(by: str) -> None:
    model = mixed()
    inner = torchopt.MetaSGD(model, lr=0.1, momentum=0.9)
    x, y = batches(1)[0]
    inner.step(squared(model(x), y))
    clone = torchopt.module_clone(model, by=by, detach_buffers=True)
    assert type(clone) is type(model)
    assert clone.first is not model.first
    assert (clone.first.weight is model.first.weight) == (by == "reference")
    assert clone.tied.weight is clone.rest[0].weight
    assert clone.norm.running_mean is not model.norm.running_mean
    assert torch.equal(clone.eval()(x), model.eval()(x))
    twin = torchopt.module_clone(inner, by=by)
    kept = inner.state_dict()
    twin.step(squared(model(x), y))
    assert all(a is b for a, b in zip(inner.state_dict(), kept, strict=True))
    assert twin.state_dict()[0][1].updates == 2
    tree = torchopt.module_clone({"a": model.first.weight}, by=by)
    assert torch.equal(tree["a"], model.first.weight)


def test_numbers_are_checked() -> None:
    for wrong in (
        lambda: torchopt.sgd(-0.1),
        lambda: torchopt.adam(eps=-1.0),
        lambda: torchopt.adam(betas=(0.9, 1.0)),
        lambda: torchopt.rmsprop(nesterov=True),
        lambda: torchopt.sgd(0.1, nesterov=True),
        lambda: torchopt.adagrad(lr_decay=-1.0),
    ):
        with pytest.raises(ValueError, match=r"must be|needs"):
            wrong()
    p = [torch.ones(2, requires_grad=True)]
    decaying = torchopt.sgd(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params must be given with weight decay"):
        decaying.update([torch.ones(2)], decaying.init(p))
    with pytest.raises(ValueError, match="of 2 leaves"):
        decaying.update(p * 2, decaying.init(p), params=p)
    with pytest.raises(TypeError, match="real and dense"):
        torchopt.sgd(0.1).update([torch.ones(2, dtype=torch.complex128)], torchopt.sgd(0.1).init(p))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchopts(name: str) -> None:
    theirs = getattr(pytest.importorskip("torchopt"), name)
    ours = getattr(torchopt, name)

    def read(value: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(value).parameters.values()]

    assert read(ours) == read(theirs)


FAIR = {  # where TorchOpt is right
    "sgd": lambda t, m: t.MetaSGD(m, lr=0.1),
    "momentum": lambda t, m: t.MetaSGD(m, 0.1, 0.9, 0.05, 0.2),
    "nesterov": lambda t, m: t.MetaSGD(m, 0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda t, m: t.MetaAdam(m, 0.05, (0.8, 0.9), 1e-3, 0.1, eps_root=1e-4),
    "adamw": lambda t, m: t.MetaAdamW(m, lambda c: 0.05 / (c + 1), eps=1e-3, weight_decay=0.1),
    "radam": lambda t, m: t.MetaRAdam(m, 0.05, (0.8, 0.7), 1e-3, 0.1),
    "adamax": lambda t, m: t.MetaAdaMax(m, 0.05, weight_decay=0.1),
    "adadelta": lambda t, m: t.MetaAdaDelta(m, 0.5, weight_decay=0.1),
    "adagrad": lambda t, m: t.MetaAdaGrad(m, 0.1, 0.2, 0.1, 0.3),
    "rmsprop": lambda t, m: t.MetaRMSProp(m, 0.02, 0.9, 1e-3, 0.1, 0.5, initial_scale=1.0, nesterov=True),
    "centred": lambda t, m: t.MetaRMSProp(m, 0.02, 0.9, 1e-3, centered=True, maximize=True),
}


@pytest.mark.parametrize("name", FAIR)
def test_against_torchopt(name: str) -> None:
    theirs = pytest.importorskip("torchopt")
    results = []
    for library in (torchopt, theirs):
        model = perceptron()
        start, inner = list(model.parameters()), FAIR[name](library, model)
        first = library.extract_state_dict(model, by="reference"), library.extract_state_dict(inner, by="reference")
        *support, query = batches(4, 3)
        for x, y in support:
            inner.step(squared(model(x), y))
        loss = squared(model(query[0]), query[1])
        results.append(flat([loss, *model.parameters(), *torch.autograd.grad(loss, start)]).detach())
        library.recover_state_dict(model, first[0])
        library.recover_state_dict(inner, first[1])
        assert all(a is b for a, b in zip(model.parameters(), start, strict=True))
    close(*results, 1e-9)

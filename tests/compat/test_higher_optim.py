"""Differentiable optimizers: the derivative of what ``torch.optim`` does, and the interface of ``higher``."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn, optim

import fastmeta.compat.higher as higher
from tests.compat.models import batches, close, flat, mixed, perceptron, slope, squared, two_steps_with_momentum

OPTIMIZERS: dict[str, Callable[[list[Tensor]], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "damped": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, maximize=True),
    "adam": lambda p: optim.Adam(p, lr=0.05, eps=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: optim.Adam(p, lr=0.05, eps=1e-3, amsgrad=True),
    "decoupled": lambda p: optim.Adam(p, lr=0.05, eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.05, eps=1e-3, weight_decay=0.1),
    "adamax": lambda p: optim.Adamax(p, lr=0.05, weight_decay=0.1),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5, eps=1e-3, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.2, initial_accumulator_value=0.1, eps=1e-3),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, lambd=0.1, t0=1, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.02, eps=1e-3, weight_decay=0.1),
    "centred": lambda p: optim.RMSprop(p, lr=0.02, eps=1e-3, centered=True, momentum=0.5),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
}


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(make: Callable[[list[Tensor]], optim.Optimizer], model: nn.Module, steps: int = 2) -> optim.Optimizer:
    """An optimizer that has a state."""
    optimizer = make(list(model.parameters()))
    for x, y in batches(steps, 3):
        optimizer.zero_grad()
        squared(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def by_torch(model: nn.Module, optimizer: optim.Optimizer, shift: list[Tensor], steps: int) -> tuple[float, Tensor]:
    """Meta-loss and adapted weights where ``torch.optim`` itself adapts a copy, from weights moved by ``shift``."""
    model, optimizer = copy.deepcopy((model, optimizer))
    with torch.no_grad():
        for p, d in zip(model.parameters(), shift, strict=True):
            p += d
    *support, query = batches(steps + 1, 3)
    for x, y in support:
        optimizer.zero_grad()
        squared(model(x), y).backward()
        optimizer.step()
    return squared(model(query[0]), query[1]).item(), flat([p.detach() for p in model.parameters()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_meta_gradient_is_the_derivative_of_torch_optims_steps(name: str) -> None:
    """From a state that is carried over; central differences along two directions."""
    model = perceptron()
    optimizer = trained(OPTIMIZERS[name], model)
    *support, query = batches(4, 3)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (patched, inner):
        for x, y in support:
            inner.step(squared(patched(x), y))
        loss = squared(patched(query[0]), query[1])
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    still = [torch.zeros_like(p) for p in model.parameters()]
    expected, adapted = by_torch(model, optimizer, still, 3)
    close(flat([p.detach() for p in patched.parameters()]), adapted, 1e-12)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        direction = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        assert along.item() == pytest.approx(
            slope(lambda h, direction=direction: by_torch(model, optimizer, [h * d for d in direction], 3)[0]),
            rel=1e-7,
            abs=1e-9,
        )


def test_a_network_with_ties_batch_norm_and_an_lstm_against_an_explicit_loop() -> None:
    model, (support, query) = mixed(), batches(2)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.5, dampening=0.3)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (patched, inner):
        for _ in range(2):
            inner.step(squared(patched(support[0]), support[1]))
        loss = squared(patched(query[0]), query[1])
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    other = mixed()
    expected = two_steps_with_momentum(other, support, query)
    assert [g is None for g in found] == [g is None for g in expected]
    close(flat(list(found)), flat(list(expected)))
    for a, b in zip(patched.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def explicit(p: list[Tensor], loss: Callable[[list[Tensor], int], Tensor], hyper: dict[str, Tensor]) -> list[Tensor]:
    """Three steps of Adam, written out."""
    m, v = [0.0] * len(p), [0.0] * len(p)
    for t in range(1, 4):
        gradients = torch.autograd.grad(loss(p, t - 1), p, create_graph=True)
        for i, g in enumerate(gradients):
            m[i] = hyper["beta1"] * m[i] + (1 - hyper["beta1"]) * g
            v[i] = hyper["beta2"] * v[i] + (1 - hyper["beta2"]) * g * g
            mean, variance = m[i] / (1 - hyper["beta1"] ** t), v[i] / (1 - hyper["beta2"] ** t)
            p = [*p[:i], p[i] - hyper["lr"] * mean / (variance.sqrt() + hyper["eps"]), *p[i + 1 :]]
    return p


def test_learned_hyper_parameters_of_adam_against_an_explicit_loop() -> None:
    model, data = perceptron(), batches(4, 3)
    values = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
    hyper = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    override = {"lr": [hyper["lr"]], "betas": [(hyper["beta1"], hyper["beta2"])], "eps": [hyper["eps"]]}
    names = [n for n, _ in model.named_parameters()]

    def loss(p: list[Tensor], k: int) -> Tensor:
        return squared(torch.func.functional_call(model, dict(zip(names, p, strict=True)), data[k][0]), data[k][1])

    start = list(model.parameters())
    expected = torch.autograd.grad(loss(explicit(start, loss, hyper), 3), [*start, *hyper.values()])
    with higher.innerloop_ctx(model, optim.Adam(start), copy_initial_weights=False, override=override) as (
        patched,
        inner,
    ):
        for x, y in data[:3]:
            inner.step(squared(patched(x), y))
        found = torch.autograd.grad(squared(patched(data[3][0]), data[3][1]), [*start, *hyper.values()])
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)


def test_groups_have_their_own_hyper_parameters_and_parameters_outside_stay() -> None:
    model, ((x, y), *_) = perceptron(), batches(1, 3)
    rates = torch.tensor([0.1, 0.2], requires_grad=True)
    optimizer = optim.SGD([{"params": [model[2].bias]}, {"params": [model[0].weight], "lr": 0.5}], lr=0.3)
    gradient = torch.autograd.grad(squared(model(x), y), [model[2].bias, model[0].weight])
    for override, expected in [
        (None, [0.3, 0.5]),
        ({"lr": [rates[0], rates[1]]}, [0.1, 0.2]),
        ({"lr": [0.7]}, [0.7] * 2),
    ]:
        with higher.innerloop_ctx(model, optimizer, override=override) as (patched, inner):
            inner.step(squared(patched(x), y))
        close(patched[2].bias, model[2].bias - expected[0] * gradient[0])
        close(patched[0].weight, model[0].weight - expected[1] * gradient[1])
        assert torch.equal(patched[0].bias, model[0].bias)
        if override and isinstance(override["lr"][0], Tensor):
            grads = torch.autograd.grad(patched[2].bias.sum() + patched[0].weight.sum(), rates)[0]
            close(grads, -torch.stack([g.sum() for g in gradient]))
    with higher.innerloop_ctx(model, optimizer) as (patched, inner):
        inner.step(squared(patched(x), y), override={"lr": [0.25]})
        close(patched[2].bias, model[2].bias - 0.25 * gradient[0])
        assert [group["lr"] for group in inner.param_groups] == [0.25, 0.25]  # from then on
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.5]


def test_callbacks_see_and_replace_gradients() -> None:
    model, ((x, y), *_) = perceptron(), batches(1, 3)
    model[0].bias.requires_grad_(False)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    seen = []

    def callback(gradients: list[Tensor | None]) -> list[Tensor | None]:
        seen.append([None if g is None else g.shape for g in gradients])
        return [None if g is None else 2 * g for g in gradients]

    patched = higher.monkeypatch(model)
    inner = higher.get_diff_optim(optimizer, model.parameters(), fmodel=patched, grad_callback=callback)
    gradients = torch.autograd.grad(squared(model(x), y), [p for p in model.parameters() if p.requires_grad])
    after = inner.step(squared(patched(x), y))
    assert seen == [[model[0].weight.shape, None, model[2].weight.shape, model[2].bias.shape]]
    close(after[0], model[0].weight - 2 * gradients[0])
    assert after[1] is patched.init_fast_params[1]
    before = patched[0].weight
    after = inner.step(squared(patched(x), y), grad_callback=lambda gs: (None if g is None else 0 * g for g in gs))
    assert torch.equal(after[0], before)
    assert len(seen) == 1


def test_steps_without_a_patched_module() -> None:
    p = torch.ones(3, requires_grad=True)
    inner = higher.get_diff_optim(optim.SGD([p], lr=0.1), [p])
    (after,) = inner.step(p.pow(3).sum(), params=[p])
    close(after, torch.full((3,), 0.7))
    close(torch.autograd.grad(after.sum(), p)[0], torch.full((3,), 1 - 0.1 * 6))
    with pytest.raises(ValueError, match="params must be given to step"):
        inner.step(after.sum())
    with pytest.raises(ValueError, match="1 tensors, got 2"):
        inner.step(after.sum(), params=[after, after])


def test_unused_and_frozen_parameters_keep_their_value() -> None:
    model, ((x, y), *_) = perceptron(), batches(1, 3)
    model[0].weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(2))
    optimizer = optim.Adam(model.parameters(), lr=0.1, weight_decay=0.5)
    for track in (True, False):
        with higher.innerloop_ctx(model, optimizer, track_higher_grads=track) as (patched, inner):
            for _ in range(3):
                inner.step(squared(patched(x), y))
            named = dict(patched.named_parameters())
        assert torch.equal(named["unused"], model.unused)
        assert torch.equal(named["0.weight"], model[0].weight)
        assert not named["0.weight"].requires_grad
        assert not torch.equal(named["2.bias"], model[2].bias)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_tracking_values_are_the_same_and_nothing_is_kept(name: str) -> None:
    model, data = perceptron(), batches(3, 3)
    optimizer = trained(OPTIMIZERS[name], model)
    results = []
    for track in (True, False):
        with higher.innerloop_ctx(model, optimizer, track_higher_grads=track) as (patched, inner):
            graphs = []
            for x, y in data:
                loss = squared(patched(x), y)
                graphs.append(weakref.ref(patched.fast_params[0]))
                inner.step(loss)
            del loss
            results.append(flat([p.detach() for p in patched.parameters()]))
            if not track:
                assert all(p.is_leaf and p.requires_grad for p in patched.parameters())
                assert all(kept() is None for kept in graphs)
                states = [v for group in inner.state for state in group.values() for v in state.values()]
                assert not any(v.requires_grad for v in states if isinstance(v, Tensor))
    assert torch.equal(*results)


def test_batch_norm_and_the_optimizers_state_are_copies() -> None:
    model = mixed()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    (x, y), (other, z), *_ = batches(3)
    squared(model(x), y).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with higher.innerloop_ctx(model, optimizer) as (patched, inner):
        inner.step(squared(patched(other), z))
    assert patched.norm.num_batches_tracked == 2
    after = (model.state_dict(), optimizer.state_dict())
    for a, b in zip(torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"decoupled"}))
def test_create_diff_optim(name: str) -> None:
    model, data = perceptron(), batches(3, 3)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    options = {k: v for k, v in optimizer.defaults.items() if k not in ("decoupled_weight_decay",)}
    patched, other = higher.monkeypatch(model), higher.monkeypatch(model)
    created = higher.create_diff_optim(type(optimizer), options, fmodel=patched)
    derived = higher.get_diff_optim(optimizer, model.parameters(), fmodel=other)
    assert type(created) is type(derived)
    for x, y in data:
        created.step(squared(patched(x), y))
        derived.step(squared(other(x), y))
    assert all(map(torch.equal, patched.parameters(), other.parameters()))


def test_create_diff_optim_from_tensors_and_groups() -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    plain = higher.create_diff_optim(optim.SGD, {"lr": 0.5}, params=iter([p, q]))
    groups = higher.create_diff_optim(optim.SGD, {"lr": 0.5}, params=[{"params": p}, {"params": [q], "lr": 0.1}])
    loss = p.sum() + q.sum()
    assert [t[0].item() for t in plain.step(loss, params=[p, q])] == [0.5, 0.5]
    assert [t[0].item() for t in groups.step(loss, params=[p, q])] == [0.5, 0.9]
    patched = higher.monkeypatch(perceptron())
    last = [{"params": patched[2].parameters(), "lr": 0.0}, {"params": [patched[0].weight]}]
    inner = higher.create_diff_optim(optim.SGD, {"lr": 0.5}, params=last, fmodel=patched)
    first = patched.fast_params
    inner.step(squared(patched(batches(1, 3)[0][0]), batches(1, 3)[0][1]))
    moved = [not torch.equal(a, b) for a, b in zip(first, patched.parameters(), strict=True)]
    assert moved == [True, False, False, False]
    with pytest.raises(ValueError, match="got neither"):
        higher.create_diff_optim(optim.SGD, {"lr": 0.1})
    with pytest.raises(ValueError, match="fast weights of fmodel"):
        higher.create_diff_optim(optim.SGD, {"lr": 0.1}, params=[{"params": [p]}], fmodel=patched)


def test_what_is_asked_wrongly_raises() -> None:
    model, ((x, y), *_) = perceptron(), batches(1, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="one value or 1, one for each group, got 2"):
        higher.get_diff_optim(optimizer, model.parameters(), override={"lr": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"override must be of dampening.* got rate"):
        higher.get_diff_optim(optimizer, model.parameters(), override={"rate": [1.0]})
    with pytest.raises(ValueError, match="every parameter of the optimizer"):
        higher.get_diff_optim(optimizer, perceptron().parameters())
    with pytest.raises(ValueError, match=r"one of ASGD, Adadelta.*got LBFGS; see register_optim"):
        higher.get_diff_optim(optim.LBFGS(model.parameters()), model.parameters())
    with (
        higher.innerloop_ctx(model, optimizer) as (_, inner),
        pytest.raises(ValueError, match="the loss must depend on a parameter"),
    ):
        inner.step(squared(model(x), y))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with (
        higher.innerloop_ctx(frozen, optim.SGD(frozen.parameters(), lr=0.1)) as (_, inner),
        pytest.raises(ValueError, match="the loss must depend on a parameter"),
    ):
        inner.step(squared(model(x), y))
    p = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    inner = higher.get_diff_optim(optim.SGD([p], lr=0.1), [p])
    with pytest.raises(TypeError, match="real and dense"):
        inner.step(p.abs().sum(), params=[p])


def test_a_registered_optimizer() -> None:
    class SignOptimizer(optim.SGD):
        pass

    class DifferentiableSign(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: object) -> None:
            for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
                for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    if g is not None:
                        state = self.state[i][j]
                        state["step"] = state.get("step", 0) + 1
                        group["params"][j] = p - group["lr"] * state["step"] * g.sign()

    model, ((x, y), *_) = perceptron(), batches(1, 3)
    higher.register_optim(SignOptimizer, DifferentiableSign)
    try:
        with higher.innerloop_ctx(model, SignOptimizer(model.parameters(), lr=0.5)) as (patched, inner):
            assert isinstance(inner, DifferentiableSign)
            for _ in range(2):
                inner.step(squared(patched(x), y))
    finally:
        del higher.optim._opt_mapping[SignOptimizer]
    assert (patched[2].bias - patched.init_fast_params[3]).abs().max() <= 1.5


def test_trainable_hyper_parameters_and_back() -> None:
    p = torch.zeros(1, requires_grad=True)
    optimizer = optim.Adam([{"params": [p]}, {"params": [torch.ones(1, requires_grad=True)], "lr": 0.5}], lr=0.1)
    override = higher.get_trainable_opt_params(optimizer)
    assert set(override) == {"lr", "betas", "eps", "weight_decay"}
    assert [v.item() for v in override["lr"]] == [0.1, 0.5]
    assert [b.item() for b in override["betas"][0]] == [0.9, 0.999]
    assert all(v.is_leaf and v.requires_grad for v in override["eps"])
    with torch.no_grad():
        override["lr"][1] += 1
        override["weight_decay"][0] += 0.25
        override["betas"][0][1].fill_(0.5)
    higher.apply_trainable_opt_params(optimizer, override)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], first["weight_decay"], second["weight_decay"]) == (0.1, 1.5, 0.25, 0)
    assert first["betas"] == (0.9, 0.5)
    assert type(first["weight_decay"]) is float
    tensor = optim.Adam([p], lr=torch.tensor(0.1))
    higher.apply_trainable_opt_params(tensor, {"lr": [torch.tensor(0.3)]})
    assert tensor.param_groups[0]["lr"].item() == 0.3
    with pytest.raises(ValueError, match="hyper-parameters of the optimizer, got rate"):
        higher.apply_trainable_opt_params(optimizer, {"rate": [0.1]})
    with pytest.raises(ValueError, match="one value or 2"):
        higher.apply_trainable_opt_params(optimizer, {"lr": [0.1] * 3})
    with pytest.raises(ValueError, match="shaped as"):
        higher.apply_trainable_opt_params(optimizer, {"betas": [torch.tensor(0.3)]})


def test_learning_the_hyper_parameters_lowers_the_meta_loss() -> None:
    """Momentum starts at 0, where it still has a gradient."""
    model, data = perceptron(), batches(4, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    override = higher.get_trainable_opt_params(optimizer)
    learned = [override["lr"][0], override["momentum"][0]]
    losses = []
    for _ in range(5):
        with higher.innerloop_ctx(model, optimizer, override=override) as (patched, inner):
            for _ in range(3):
                inner.step(squared(patched(data[0][0]), data[0][1]))
            loss = squared(patched(data[0][0]), data[0][1])
        gradients = torch.autograd.grad(loss, learned)
        assert all(g != 0 for g in gradients)
        with torch.no_grad():
            for value, g in zip(learned, gradients, strict=True):
                value -= 0.02 * g
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    higher.apply_trainable_opt_params(optimizer, override)
    assert optimizer.param_groups[0]["momentum"] == learned[1].item() != 0


@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamw", "adagrad", "rmsprop", "centred", "adadelta", "adamax"])
def test_second_moments_of_zero(name: str) -> None:
    """A weight on an input that is always zero: it has no gradient, and the others' must not suffer."""
    model, data = perceptron(), batches(4, 3)
    for x, _ in data:
        x[:, 0] = 0
    with higher.innerloop_ctx(model, OPTIMIZERS[name](list(model.parameters())), copy_initial_weights=False) as (
        patched,
        inner,
    ):
        for x, y in data[:3]:
            inner.step(squared(patched(x), y))
        loss = squared(patched(data[3][0]), data[3][1])
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(model.parameters())))


def test_memory_does_not_grow_over_evaluations() -> None:
    model, ((x, y), *_) = perceptron(), batches(1, 3)
    optimizer = optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    kept = []
    for _ in range(3):
        with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (patched, inner):
            for _ in range(3):
                inner.step(squared(patched(x), y))
        kept.append(weakref.ref(patched))
        del patched, inner
    assert [k() for k in kept] == [None] * 3


@pytest.mark.filterwarnings("ignore:Differentiable")  # of theirs
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("damped", "decoupled", "adamw", "centred")])
def test_against_higher(name: str) -> None:
    """Where higher is right; Adam with an eps that plays no part, which higher 0.2.1 has in another place."""
    theirs = pytest.importorskip("higher")
    model, data = perceptron(), batches(4, 3)
    make = OPTIMIZERS[name]
    if name in ("adam", "amsgrad"):
        make = lambda p: optim.Adam(p, lr=0.05, eps=1e-14, amsgrad=name == "amsgrad")  # noqa: E731
    optimizer = trained(make, model)
    results = []
    for library in (higher, theirs):
        with library.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (patched, inner):
            for x, y in data[:3]:
                inner.step(squared(patched(x), y))
            loss = squared(patched(data[3][0]), data[3][1])
        results.append(flat([loss, *torch.autograd.grad(loss, list(model.parameters()))]))
    close(*results, 1e-9)
    assert torch.isfinite(results[0]).all()

"""Loops of three libraries through a perceptron's node: meta-gradients, what stands beside it, what is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta.compat.higher as higher
import fastmeta.compat.learn2learn as l2l
import fastmeta.compat.torchopt as torchopt
from tests.compat.models import close
from tests.compat.test_descent import directions, network


def of_learn2learn(net: nn.Sequential, tasks: list[Any], steps: int) -> list[Tensor]:
    learner, losses = l2l.algorithms.MAML(net, lr=0.1), []
    for x, y in tasks:
        clone = learner.clone()
        for _ in range(steps):
            clone.adapt(F.mse_loss(clone(x), y))
            assert type(next(iter(clone.parameters())).grad_fn).__name__ == "_NodeBackward"
        losses.append(F.mse_loss(clone(x + 1), y))
    return losses


def of_higher(net: nn.Sequential, tasks: list[Any], steps: int) -> list[Tensor]:
    losses, optimizer = [], torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in tasks:
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(steps):
                inner.step(F.mse_loss(fast(x), y))
                assert type(next(fast.parameters()).grad_fn).__name__ == "_NodeBackward"
            losses.append(F.mse_loss(fast(x + 1), y))
    return losses


def of_torchopt(net: nn.Sequential, tasks: list[Any], steps: int) -> list[Tensor]:
    losses, optimizer = [], torchopt.MetaSGD(net, lr=0.1)
    start = torchopt.extract_state_dict(net)
    for x, y in tasks:
        for i in range(steps):
            optimizer.step(F.mse_loss(net(x), y))
            assert type(net[0].weight.grad_fn).__name__ == "_NodeBackward"
            assert optimizer.state_groups[0][0].updates == i + 1
        losses.append(F.mse_loss(net(x + 1), y))
        torchopt.recover_state_dict(net, start)
        optimizer.state_groups[0] = optimizer.impl.init(tuple(net.parameters()))
    return losses


def written_out(net: nn.Sequential, tasks: list[Any], steps: int) -> list[Tensor]:
    losses = []
    for x, y in tasks:
        p = dict(net.named_parameters())
        for _ in range(steps):
            loss = F.mse_loss(torch.func.functional_call(net, p, x), y)
            g = torch.autograd.grad(loss, list(p.values()), create_graph=True)
            p = {name: q - 0.1 * d for (name, q), d in zip(p.items(), g, strict=True)}
        losses.append(F.mse_loss(torch.func.functional_call(net, p, x + 1), y))
    return losses


def batch() -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    return [tuple(torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(2)) for _ in range(3)]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("loop", [of_learn2learn, of_higher, of_torchopt])
def test_loops(loop: Callable[..., list[Tensor]], activation: type[nn.Module], steps: int) -> None:
    net = network(activation)
    p = list(net.parameters())
    found, expected = (
        torch.autograd.grad(torch.stack(way(net, batch(), steps)).sum(), p) for way in (loop, written_out)
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-11)


def spare(requires_grad: bool) -> nn.Sequential:
    net = network()
    net[0].register_parameter("spare", nn.Parameter(torch.ones(2).double(), requires_grad))
    return net


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters_beside_a_perceptrons(requires_grad: bool) -> None:
    x, y = batch()[0]
    learner = l2l.algorithms.MAML(spare(requires_grad), lr=0.1).clone()
    with pytest.raises(RuntimeError, match=r"0\.spare"):
        learner.adapt(F.mse_loss(learner(x), y), allow_unused=not requires_grad)
    for _ in range(2):
        learner.adapt(F.mse_loss(learner(x), y), allow_unused=requires_grad, allow_nograd=not requires_grad)


def test_a_meta_gradient_that_is_differentiated() -> None:
    net = network()
    p = list(net.parameters())
    found, expected = (
        torch.autograd.grad(torch.autograd.grad(way(net, batch()[:1], 2)[0], p, create_graph=True), p, directions(p))
        for way in (of_learn2learn, written_out)
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("loop", [of_learn2learn, of_higher, of_torchopt])
def test_nothing_is_kept_in_a_cycle(loop: Callable[..., list[Tensor]]) -> None:
    net, tasks = network(), batch()[:1]
    gc.collect()
    gc.disable()
    try:
        loss = loop(net, tasks, 3)[0]
        loss.backward()
        result = weakref.ref(loss)
        del loss
        assert result() is None
        before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        loops = 8
        for _ in range(loops):
            loop(net, tasks, 3)[0].backward()
        after = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        assert after - before < loops  # a cycle would keep one of every loop at least
    finally:
        gc.enable()

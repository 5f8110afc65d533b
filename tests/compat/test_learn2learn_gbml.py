"""GBML under learn2learn's names: inner gradients through transforms that are learned, and that adapt."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta.compat.learn2learn as l2l
from tests.compat.learn2learn_cases import Task, assert_equal, gradients, loop, made, mlp


class Rate(nn.Module):
    """One learned factor an element."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones(inputs))

    def forward(self, grad: Tensor) -> Tensor:
        return self.rate * grad


TRANSFORMS: dict[str, Callable[[nn.Module], Callable]] = {
    "scale": lambda model: l2l.optim.ModuleTransform(Rate),
    "kronecker": lambda model: l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear),
    "curvature": lambda model: l2l.optim.MetaCurvatureTransform,
    "head": lambda model: l2l.optim.TransformDictionary({model[-1]: l2l.optim.transforms.ModuleTransform(nn.Linear)}),
}


def learner(name: str, transform: str, **settings: bool) -> tuple[l2l.algorithms.GBML, list[Task]]:
    model, tasks = made(name)
    gbml = l2l.algorithms.GBML(model, TRANSFORMS[transform](model), lr=0.3, **settings).double()
    with torch.no_grad():
        for p in gbml.compute_update.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gbml, tasks


def explicit(gbml: l2l.algorithms.GBML, tasks: list[Task], steps: int) -> Tensor:
    """The rule written out on dicts: transforms psi adapt from the second step on, by the same loss."""
    model, update = gbml.module, gbml.compute_update
    losses = []
    for (xs, ys), (xq, yq) in tasks:
        phi: dict[str, Tensor] = dict(model.named_parameters())
        psi: dict[str, Tensor] = dict(update.named_parameters())
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        for k in range(steps):
            loss = F.cross_entropy(functional_call(model, {**phi, **buffers}, (xs,)), ys)
            graph = not gbml.first_order
            if gbml.adapt_transform and k:
                d = torch.autograd.grad(loss, list(psi.values()), create_graph=graph, retain_graph=True)
                psi = {n: p - 0.3 * g for (n, p), g in zip(psi.items(), d, strict=True)}
            g = torch.autograd.grad(loss, list(phi.values()), create_graph=graph or gbml.adapt_transform)
            for (n, p), i, d in zip(list(phi.items()), update.transforms_indices, g, strict=True):
                if i is not None:
                    prefix = f"transforms_modules.{i}."
                    own = {m.removeprefix(prefix): v for m, v in psi.items() if m.startswith(prefix)}
                    d = functional_call(update.transforms_modules[i], own, (d,))
                phi[n] = p - 0.3 * d
        losses.append(F.cross_entropy(functional_call(model, {**phi, **buffers}, (xq,)), yq))
    return torch.stack(losses).mean()


def test_signatures() -> None:
    gbml = l2l.algorithms.GBML
    given = {name: p.default for name, p in inspect.signature(gbml).parameters.items() if p.kind is not p.VAR_KEYWORD}
    none = inspect.Parameter.empty
    defaults = {"lr": 1.0, "adapt_transform": False, "first_order": False, "allow_unused": False, "allow_nograd": False}
    assert given == {"module": none, "transform": none, **defaults}
    assert list(inspect.signature(gbml.adapt).parameters)[1:] == ["loss", "first_order", "allow_nograd", "allow_unused"]
    names = ["first_order", "allow_unused", "allow_nograd", "adapt_transform"]
    assert list(inspect.signature(gbml.clone).parameters)[1:] == names
    with pytest.raises(TypeError, match="GBML: further keywords must be compute_update alone, got first_oder"):
        gbml(mlp(), l2l.optim.MetaCurvatureTransform, first_oder=True)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapt_transform", [False, True])
@pytest.mark.parametrize(
    ("name", "transform"), [*(("mlp", t) for t in TRANSFORMS), ("conv", "kronecker"), ("conv", "curvature")]
)
def test_meta_gradient(name: str, transform: str, adapt_transform: bool, first_order: bool) -> None:
    gbml, tasks = learner(name, transform, adapt_transform=adapt_transform, first_order=first_order)
    value, truth = loop(gbml, tasks, 3), explicit(gbml, tasks, 3)
    wanted = list(gbml.parameters())
    assert_equal([value, *gradients(value, wanted)], [truth, *gradients(truth, wanted)], 1e-11)
    assert any(g.norm() > 0 for g in gradients(truth, gbml.compute_update.parameters()))


def test_adapting_the_transforms_makes_a_difference() -> None:
    gbml, tasks = learner("mlp", "scale")
    fixed = loop(gbml, tasks, 3)
    gbml.adapt_transform = True
    assert not torch.equal(loop(gbml, tasks, 3), fixed)
    assert torch.equal(loop(gbml, tasks, 1), loop(gbml.clone(adapt_transform=False), tasks, 1))  # from the second step


def test_unit_scales_make_it_maml() -> None:
    model, tasks = made("mlp")
    gbml = l2l.algorithms.GBML(model, TRANSFORMS["scale"](model), lr=0.3).double()
    maml = l2l.algorithms.MAML(model, lr=0.3)
    value, truth = loop(gbml, tasks, 2), loop(maml, tasks, 2)
    assert_equal(gradients(value, model.parameters()), gradients(truth, model.parameters()))


@pytest.mark.parametrize("adapt_transform", [False, True])
def test_a_clone_is_connected_to_the_base_before_and_after_adaptation(adapt_transform: bool) -> None:
    model, x = mlp(), torch.randn(7, 5)
    gbml = l2l.algorithms.GBML(model, TRANSFORMS["scale"](model), lr=0.01, adapt_transform=adapt_transform)
    for steps in (0, 1):
        gbml.zero_grad()
        clone = gbml.clone()
        assert torch.equal(clone(x), model(x))
        loss = clone(x).norm()
        if steps:
            clone.adapt(loss)
            assert clone(x).norm() < loss
        clone(x).norm().backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


def test_a_clone_of_an_adapted_clone_goes_on() -> None:
    gbml, tasks = learner("mlp", "kronecker")
    (xs, ys), (xq, yq) = tasks[0]
    clone = gbml.clone()
    for _ in range(2):
        clone.adapt(F.cross_entropy(clone(xs), ys))
        clone = clone.clone()
    value, truth = F.cross_entropy(clone(xq), yq), explicit(gbml, tasks[:1], 2)
    assert_equal(gradients(value, gbml.parameters()), gradients(truth, gbml.parameters()), 1e-11)


def test_unused_and_frozen_parameters() -> None:
    model = mlp()
    gbml = l2l.algorithms.GBML(model, TRANSFORMS["scale"](model), lr=0.1)
    clone = gbml.clone()
    loss = clone.module[0].weight.norm()
    with pytest.raises(RuntimeError, match=r"ParameterUpdate: loss must be .* number 1 of shape \[8\]"):
        clone.adapt(loss)
    clone.adapt(loss, allow_unused=True)
    assert torch.equal(clone.module[0].bias, model[0].bias)
    assert not torch.equal(clone.module[0].weight, model[0].weight)

    model[2].weight.requires_grad_(False)
    clone = gbml.clone()
    loss = clone(torch.randn(7, 5)).norm()
    with pytest.raises(
        RuntimeError, match=r"ParameterUpdate: parameters must be .* number 2 of shape \[8, 8\]; pass al"
    ):
        clone.adapt(loss)
    clone.adapt(loss, allow_nograd=True)
    clone(torch.randn(7, 5)).norm().backward()
    assert [p.grad is None for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]
    assert gbml.clone(allow_nograd=True).allow_nograd
    assert torch.equal(clone.module[2].weight, model[2].weight)


def test_a_transform_that_the_loss_does_not_reach_is_named() -> None:
    model = mlp()
    gbml = l2l.algorithms.GBML(model, TRANSFORMS["scale"](model), lr=0.1, adapt_transform=True)
    clone = gbml.clone()
    clone.adapt(clone(torch.randn(7, 5)).norm())
    loss = clone.module[0].weight.norm()
    with pytest.raises(
        RuntimeError, match=r"GBML.adapt \(adapt_transform\): loss .* transforms_modules.1.transform.rate"
    ):
        clone.adapt(loss)

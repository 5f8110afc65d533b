"""Updates through transforms, an optimiser that learns them, and the small modules beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastmeta.compat.learn2learn as l2l
from tests.compat.learn2learn_cases import Recurrent, assert_equal, mlp


def linear(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def perturbed(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    return module


def test_module_transform() -> None:
    transform = perturbed(l2l.optim.ModuleTransform(nn.Linear)(linear(2, 3)))
    g = torch.randn(3, 2, dtype=torch.float64).t()
    inner = transform.transform
    assert_equal([transform(g)], [(inner.weight @ g.flatten() + inner.bias).reshape(2, 3)])


@pytest.mark.parametrize("psd", [False, True])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (5, 3, 2, 2)])
def test_kronecker_transform(shape: tuple[int, ...], psd: bool) -> None:
    made = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear, bias=True, psd=psd)(linear(*shape))
    transform = perturbed(made)
    inner, g = transform.transform, torch.randn(shape, dtype=torch.float64)
    left, right = inner.left, inner.right
    if psd:
        left, right = left.t() @ left, right.t() @ right
    blocks = g.reshape(-1, left.shape[0], right.shape[0])
    expected = torch.einsum("ij,bjk,kl->bil", left, blocks, right) + inner.bias
    assert_equal([transform(g)], [expected.reshape(shape)])
    with pytest.raises(
        NotImplementedError, match=r"KroneckerTransform: param must be of 1, 2 or 4 axes, got \[1, 2, 3\]"
    ):
        l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)(linear(1, 2, 3))


def test_meta_curvature() -> None:
    def made(*shape: int) -> tuple[nn.Module, Tensor]:
        start = l2l.optim.MetaCurvatureTransform(linear(*shape), lr=0.5)
        g = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(start(g), 0.5 * g)
        return perturbed(start), g

    t, g = made(3)
    assert_equal([t(g)], [0.5 * t.mc * g])
    t, g = made(3, 4)
    assert_equal([t(g)], [0.5 * t.mc_in @ g @ t.mc_out])
    t, g = made(3, 4, 2, 2)
    expected = 0.5 * torch.einsum("ai,cf,iof,ob->abc", t.mc_in, t.mc_f, g.flatten(2), t.mc_out)
    assert_equal([t(g)], [expected.reshape(g.shape)])
    assert torch.autograd.gradcheck(t, g.requires_grad_())
    with pytest.raises(NotImplementedError, match=r"MetaCurvatureTransform: param must be of 1, 2 or 4 axes"):
        l2l.optim.MetaCurvatureTransform(linear(1, 2, 3))


def test_transform_dictionary() -> None:
    model = mlp()
    scale = l2l.optim.ModuleTransform(nn.Linear)
    chosen = l2l.optim.TransformDictionary({model[0]: scale, model[0].bias: l2l.optim.MetaCurvatureTransform})
    assert isinstance(chosen(model[0].weight), l2l.optim.ReshapedTransform)
    assert isinstance(chosen(model[0].bias), l2l.optim.MetaCurvatureTransform)
    assert chosen(model[0].bias, lr=0.5).lr == 0.5
    assert chosen(model[2].bias) is None
    with pytest.raises(ValueError, match=r"TransformDictionary: keys must be Modules or Parameters, got str.*get_sub"):
        l2l.optim.TransformDictionary({"0.weight": scale})


def test_parameter_update() -> None:
    model, x = mlp(), torch.randn(7, 5)
    parameters = list(model.parameters())
    chosen = l2l.optim.TransformDictionary({model[0]: l2l.optim.MetaCurvatureTransform})
    update = l2l.optim.ParameterUpdate(parameters, chosen)
    assert update.transforms_indices == [0, 1, None, None, None, None]
    with torch.no_grad():
        update.transforms_modules[1].mc.fill_(3.0)
    g = torch.autograd.grad(model(x).norm(), parameters)
    found = update(model(x).norm(), model.parameters())
    assert_equal(found, [g[0], 3 * g[1], *g[2:]], 1e-6)
    loss = model(x).norm()
    update(loss, parameters, create_graph=True)[2].norm().backward()  # what the gradients need is kept
    assert all(p.grad is not None for p in parameters)

    loss = parameters[0].norm()
    found = update(loss, parameters, allow_unused=True, retain_graph=True)
    assert [u is None for u in found] == [False] + 5 * [True]
    parameters[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"ParameterUpdate: parameters must be .* number 0 of shape \[8, 5\]"):
        update(model(x).norm(), parameters)
    assert update(model(x).norm(), parameters, allow_nograd=True)[0] is None
    with pytest.raises(ValueError, match="ParameterUpdate: parameters must be 6, as many as there are transforms for"):
        update(loss, parameters[:2])
    with pytest.raises(ValueError, match="ParameterUpdate: a transform must be a Module or None, got function"):
        l2l.optim.ParameterUpdate(parameters, lambda p: lambda g: g)


def test_differentiable_sgd() -> None:
    model = mlp()
    sgd = l2l.optim.DifferentiableSGD(lr=nn.Parameter(torch.tensor(0.1)))
    g = [torch.randn_like(p) for p in model.parameters()]
    clone = l2l.clone_module(model)
    assert sgd(clone, [*g[:-1], None]) is None
    moved = [p - 0.1 * d for p, d in zip(model.parameters(), g, strict=True)]
    assert_equal(clone.parameters(), [*moved[:-1], list(model.parameters())[-1]], 1e-7)
    sum(p.sum() for p in clone.parameters()).backward()
    assert torch.allclose(sgd.lr.grad, -sum(d.sum() for d in g[:-1]))

    other = mlp()
    for p, d in zip(other.parameters(), g, strict=True):
        p.grad = d
    before = [p.detach().clone() for p in other.parameters()]
    l2l.optim.DifferentiableSGD(0.1)(other)
    assert_equal(other.parameters(), [p - 0.1 * d for p, d in zip(before, g, strict=True)], 1e-7)


class Rate(nn.Module):
    def __init__(self, param: Tensor) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.ones_like(param))

    def forward(self, grad: Tensor) -> Tensor:
        return self.rate * grad


@pytest.mark.parametrize("make", [mlp, Recurrent])
def test_learnable_optimizer(make) -> None:
    model = make().double()
    x = torch.randn(7, 5, dtype=torch.float64) if make is mlp else torch.randn(7, 5, 4, dtype=torch.float64)
    optimizer = l2l.optim.LearnableOptimizer(model, Rate, lr=0.1)
    meta = torch.optim.SGD(optimizer.parameters(), lr=0.5)
    assert len(list(optimizer.parameters())) == len(list(model.parameters()))

    values = [p.detach().clone() for p in model.parameters()]
    rates = [torch.ones_like(p) for p in values]
    previous: list[Tensor] = []
    for _ in range(3):
        optimizer.zero_grad()
        meta.zero_grad()
        loss = model(x).norm()
        loss.backward()
        given = [p.grad.clone() for p in model.parameters()]
        if previous:  # d loss/d rate = -lr * (gradient of the step before) * (gradient now)
            hyper = [-0.1 * a * b for a, b in zip(previous, given, strict=True)]
            assert_equal([p.grad for p in optimizer.parameters()], hyper)
            rates = [r - 0.5 * d for r, d in zip(rates, hyper, strict=True)]
        meta.step()
        optimizer.step()
        values = [v - 0.1 * r * g for v, r, g in zip(values, rates, given, strict=True)]
        assert_equal(model.parameters(), values)
        previous = given


def test_learnable_optimizer_without_anything_to_learn_is_descent() -> None:
    model, x = mlp(), torch.randn(7, 5)
    model[0].weight.requires_grad_(False)
    reference = copy.deepcopy(model)
    optimizer = l2l.optim.LearnableOptimizer(model, lambda p: None, lr=0.1)
    plain = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        for module, steps in ((model, optimizer), (reference, plain)):
            steps.zero_grad()
            module(x).square().mean().backward()
            steps.step()
    assert_equal(model.parameters(), reference.parameters(), 1e-7)
    with pytest.raises(TypeError, match=r"LearnableOptimizer: model must be a torch.nn.Module, got list"):
        l2l.optim.LearnableOptimizer([], Rate)


@pytest.mark.parametrize(("n", "m"), [(2, 3), (1, 4), (5, 1), (1, 1)])
def test_kronecker_linear(n: int, m: int) -> None:
    layer = perturbed(l2l.nn.KroneckerLinear(n, m))
    x = torch.randn(n, m, dtype=torch.float64)
    full = torch.kron(layer.right.t().contiguous(), layer.left)
    columns = full @ x.t().flatten() + layer.bias.t().flatten()
    assert_equal([layer(x).t().flatten(), layer(x.t().flatten())], [columns, columns])
    fresh = l2l.nn.KroneckerLinear(n, m, bias=False, psd=True, device="cpu")
    assert torch.equal(fresh(x.float()), x.float())
    for wrong in (torch.randn(n, m + 1), torch.randn(n * (m + 1))):
        with pytest.raises(ValueError, match=r"KroneckerLinear: x must be of shape"):
            fresh(wrong)


def test_small_modules() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(l2l.nn.Lambda(lambda a, b: a + b)(x, b=1.0), x + 1)
    assert l2l.nn.Flatten()(x).shape == (2, 12)
    assert torch.equal(l2l.nn.Scale()(x), x)
    assert torch.equal(l2l.nn.Scale(4, alpha=0.5)(x), 0.5 * x)
    assert l2l.nn.Scale((3, 4)).alpha.shape == (3, 4)
    model = mlp()
    assert l2l.nn.freeze(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in l2l.nn.unfreeze(model).parameters())

"""A perceptron's gradient as one node of the graph: the values, its derivatives, and what goes through autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fastmeta.compat import descent
from fastmeta.compat.perceptron import recognised
from fastmeta.core import native
from tests.compat.models import close

Loss = Callable[[Tensor], Tensor]

LABELS = torch.tensor([0, 2, 1, 1, 0, -100])
ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity]
LOSSES: dict[str, Loss] = {
    "mean of squares": lambda o: F.mse_loss(o, torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)),
    "sum of squares": lambda o: F.mse_loss(o, torch.ones_like(o).detach(), reduction="sum"),
    "cross entropy": lambda o: F.cross_entropy(o, LABELS),
    "sum of cross entropies": lambda o: F.cross_entropy(o, LABELS.clamp_min(0), reduction="sum"),
}


def network(activation: type[nn.Module] = nn.Tanh, *, bias: bool = True, last: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5, bias=bias), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3, bias=bias)]
    return nn.Sequential(*layers, *([activation()] if last else [])).double()


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def directions(parameters: list[Any], seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters]


def stepped(p: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [a + (-0.1 * b) for a, b in zip(p, g, strict=True)]


def at_once(p: list[Tensor], g: list[Tensor]) -> list[Tensor]:
    return [torch.sub(a, b, alpha=0.1) for a, b in zip(p, g, strict=True)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_to_the_third_order(activation: type[nn.Module], loss: Loss, bias: bool, last: bool) -> None:
    net = network(activation, bias=bias, last=last)
    p, x = list(net.parameters()), inputs()
    v, w = directions(p), directions(p, 3)
    assert recognised(loss(net(x)), p) is not None
    ours, theirs = descent.gradients(loss(net(x)), p), torch.autograd.grad(loss(net(x)), p, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    once = torch.autograd.grad(ours, p, v, retain_graph=True)
    thrice = torch.autograd.grad(ours, p, v, create_graph=True)
    expected = torch.autograd.grad(theirs, p, v, create_graph=True)
    for a, b, c in zip(once, thrice, expected, strict=True):
        close(a, c, 1e-12)
        close(b, c, 1e-12)
    third, known = (torch.autograd.grad(g, p, w, materialize_grads=True) for g in (thrice, expected))
    for a, b in zip(third, known, strict=True):
        assert (a - b).norm() <= 1e-11 * (1 + b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("step", "known"), [(descent.rounded, stepped), (descent.fused, at_once)])
def test_a_step_has_autograds_bits(step: Any, known: Any, dtype: torch.dtype) -> None:
    net, x = network(nn.ReLU).to(dtype), inputs(dtype)
    p, loss = list(net.parameters()), LOSSES["mean of squares"]
    ours = descent.descended(loss(net(x)), p, 0.1, step)
    theirs = known(p, list(torch.autograd.grad(loss(net(x)), p, create_graph=True)))
    assert ours is not None
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    v = directions(p)
    for a, b in zip(torch.autograd.grad(ours, p, v), torch.autograd.grad(theirs, p, v), strict=True):
        close(a, b, {torch.float64: 1e-12, torch.float32: 1e-5}[dtype])


@pytest.mark.parametrize("loss", ["mean of squares", "cross entropy"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid])
def test_derivatives_by_differences(activation: type[nn.Module], loss: str) -> None:
    net, x = network(activation), inputs()
    names = [name for name, _ in net.named_parameters()]

    def step(*p: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(net, dict(zip(names, p, strict=True)), x)
        found = descent.descended(LOSSES[loss](out), p, 0.1, descent.fused)
        assert found is not None
        return tuple(q for q in found if q is not None)

    start = tuple(net.parameters())
    assert torch.autograd.gradcheck(step, start)
    assert torch.autograd.gradgradcheck(step, start)


def test_some_cotangents_are_absent() -> None:
    net, x = network(), inputs()
    p, loss = list(net.parameters()), LOSSES["cross entropy"]
    ours, theirs = descent.gradients(loss(net(x)), p), torch.autograd.grad(loss(net(x)), p, create_graph=True)
    for i in range(len(p)):
        v = directions(p)[i]
        found = torch.autograd.grad(ours[i], p, v, retain_graph=True, materialize_grads=True)
        known = torch.autograd.grad(theirs[i], p, v, retain_graph=True, materialize_grads=True)
        for a, b in zip(found, known, strict=True):
            close(a, b, 1e-11)


def test_parameters_that_the_loss_does_not_use() -> None:
    net, spare = network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    p = [spare, *net.parameters()]
    found = descent.descended(F.mse_loss(net(inputs()), torch.zeros(6, 3).double()), p, 0.1, descent.fused)
    assert found is not None
    assert [q is None for q in found] == [True] + [False] * 6


class Plain(nn.Module):
    """A perceptron with a ``forward`` of its own, and whatever a case does to it."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.change(self.first(x))))


def test_a_module_with_a_forward_of_its_own() -> None:
    net = Plain()
    assert recognised(LOSSES["mean of squares"](net(inputs())), list(net.parameters())) is not None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def square(o: Tensor) -> Tensor:
    return F.mse_loss(o, torch.zeros_like(o).detach())


def frozen() -> nn.Module:
    net = Plain()
    net.first.weight.requires_grad_(False)
    return net


WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
OTHERWISE: dict[str, Callable[[], tuple[nn.Module, Tensor, Loss]]] = {
    "convolution": lambda: (nn.Conv1d(3, 2, 1).double(), inputs()[..., None], square),
    "a frozen weight": lambda: (frozen(), inputs(), square),
    "a tied weight": lambda: (Tied(), inputs(), square),
    "a computed weight": lambda: (parametrizations.weight_norm(nn.Linear(3, 2).double()), inputs(), square),
    "more axes": lambda: (Plain(), inputs()[None], square),
    "an input that is differentiated": lambda: (Plain(), inputs().requires_grad_(), square),
    "another activation": lambda: (Plain(F.silu), inputs(), square),
    "a residual": lambda: (Plain(lambda h: h + h.tanh()), inputs(), square),
    "a penalty": lambda: (Plain(), inputs(), lambda o: square(o) + o.sum()),
    "another loss": lambda: (Plain(), inputs(), lambda o: o.square().mean()),
    "losses of rows": lambda: (Plain(), inputs(), lambda o: F.mse_loss(o, o.detach() + 1, reduction="none").sum()),
    "targets that are differentiated": lambda: (Plain(), inputs(), lambda o: F.mse_loss(o, o.tanh())),
    "weights of classes": lambda: (Plain(), inputs(), lambda o: F.cross_entropy(o, LABELS, WEIGHTS)),
    "smoothed labels": lambda: (Plain(), inputs(), lambda o: F.cross_entropy(o, LABELS, label_smoothing=0.1)),
    "half precision": lambda: (Plain().to(torch.bfloat16), inputs(torch.bfloat16), square),
    "no rows": lambda: (Plain(), inputs()[:0], lambda o: F.mse_loss(o, o.detach(), reduction="sum")),
    "many rows": lambda: (Plain(), inputs().repeat(100_000, 1), square),
}


@pytest.mark.parametrize("case", OTHERWISE.values(), ids=OTHERWISE)
def test_whatever_else_goes_through_autograd(case: Callable[[], tuple[nn.Module, Tensor, Loss]]) -> None:
    net, x, loss = case()
    p = [q for q in net.parameters() if q.requires_grad]
    assert recognised(loss(net(x)), p) is None
    expected = torch.autograd.grad(loss(net(x)), p, create_graph=True)
    for a, b in zip(descent.gradients(loss(net(x)), p), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("step", [None, descent.fused])
def test_weights_that_lie_transposed(step: Any) -> None:
    net, x = Plain(), inputs()
    net.second.weight = nn.Parameter(net.second.weight.detach().t().contiguous().t())
    p = list(net.parameters())
    assert not p[2].is_contiguous()
    assert recognised(square(net(x)), p) is not None
    theirs: Any = torch.autograd.grad(square(net(x)), p, create_graph=True)
    theirs = theirs if step is None else at_once(p, list(theirs))
    loss = square(net(x))
    ours: Any = descent.gradients(loss, p) if step is None else descent.descended(loss, p, 0.1, step)
    found, expected = (torch.autograd.grad(of, p, directions(p)) for of in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-12)


def test_parameters_that_depend_on_one_another() -> None:
    weight = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    other = weight.new_ones(3, 2) + weight.t() * 2
    loss = square(torch.relu(inputs() @ weight.t()) @ other.t())
    assert recognised(loss, [weight, other]) is None
    copy = weight.clone()
    again = copy.clone()
    assert recognised(square(torch.relu(inputs()[:, :2] @ copy) @ again.t()), [copy, again]) is None
    assert recognised(square(inputs() @ copy.t()), [copy]) is not None


def test_results_in_between_as_parameters() -> None:
    weight = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    out = inputs() @ weight.t()
    assert recognised(square(out), [out]) is None


def called_in(watch: Callable[[nn.Module, list[Any]], object]) -> list[Any]:
    net, calls = Plain(), list[Any]()
    watch(net, calls)
    descent.gradients(square(net(inputs())), list(net.parameters()))
    return calls


def on_output(net: Any, calls: list[Any]) -> None:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(calls.append)

    net.register_forward_hook(hook)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "watch",
    [
        on_output,
        lambda net, calls: net.second.bias.register_hook(calls.append),
        lambda net, calls: net.first.register_full_backward_hook(lambda *a: calls.append(a)),
    ],
    ids=["of an output", "of a parameter", "of a module"],
)
def test_hooks_are_called(watch: Callable[[nn.Module, list[Any]], object]) -> None:
    assert len(called_in(watch)) == 1


def hooked(change: Callable[[Tensor], Tensor | None], places: tuple[str, ...] = ("first",)) -> Plain:
    """A perceptron with a hook on the results of some layers, which nothing in the graph shows."""
    net = Plain()
    for place in places:
        hook: Any = lambda module, args, out: (out.register_hook(change), None)[1]  # noqa: E731
        getattr(net, place).register_forward_hook(hook)
    return net


def test_hooks_that_the_graph_does_not_show_are_called() -> None:
    seen = list[Tensor]()
    net = hooked(lambda g: seen.append(g))
    p = list(net.parameters())
    found = descent.gradients(square(net(inputs())), p)
    assert recognised(square(net(inputs())), p) is not None
    (dz,) = seen
    close(dz.sum(0), found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda g: 2 * g,
        lambda g: g.clamp(-1e-3, 1e-3),
        lambda g: (9 * g).sin(),
        lambda g: g * (g != g.max()),
        lambda g: 0 * g,
    ],
    ids=["scaled", "clipped", "bent", "one left out", "stopped"],
)
def test_hooks_that_change_the_gradient(change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    net, x = hooked(change).to(dtype), inputs(dtype)
    p = list(net.parameters())
    theirs = torch.autograd.grad(square(net(x)), p, create_graph=True)
    ways = {
        "gradients": (descent.gradients(square(net(x)), p), theirs),
        "rounded": (descent.descended(square(net(x)), p, 0.1, descent.rounded), stepped(p, list(theirs))),
        "fused": (descent.descended(square(net(x)), p, 0.1, descent.fused), at_once(p, list(theirs))),
    }
    v = directions(p)
    for ours, expected in ways.values():
        assert ours is not None
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))  # type: ignore[arg-type]
        given = [torch.autograd.grad(of, p, v, retain_graph=True, materialize_grads=True) for of in (ours, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))


def apart(net: Plain, x: Tensor) -> tuple[Tensor, Tensor]:
    """A result that the graph does not show, and the loss."""
    z = net.first(x)
    return z, square(net.second(torch.relu(z)))


def test_hooks_that_come_late_are_called() -> None:
    net, x, seen = Plain(), inputs(), list[Tensor]()
    p = list(net.parameters())
    for _ in range(3):
        descent.gradients(apart(net, x)[1], p)
    z, loss = apart(net, x)
    z.register_hook(seen.append)
    descent.gradients(loss, p)
    assert len(seen) == 1
    z, loss = apart(net, x)
    loss.grad_fn.next_functions[0][0].register_prehook(seen.append)  # type: ignore[union-attr]
    for _ in range(3):
        descent.gradients(apart(net, x)[1], p)
    descent.gradients(loss, p)
    assert len(seen) == 2


def test_without_hooks_autograd_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Plain(), inputs()
    p = list(net.parameters())
    descent.gradients(apart(net, x)[1], p)
    expected = torch.autograd.grad(apart(net, x)[1], p)
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("it was"))
    found = descent.gradients(apart(net, x)[1], p)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite_goes_through_autograd() -> None:
    net, x = Plain(), inputs()
    x[0, 0] = torch.inf
    p = list(net.parameters())
    expected = torch.autograd.grad(square(net(x)), p, create_graph=True)
    found = descent.gradients(square(net(x)), p)
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, expected, strict=True))  # type: ignore[union-attr]
    assert "_Node" not in type(found[0].grad_fn).__name__  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("features", [(1, 1), (7, 33), (16, 8), (784, 10)])
@pytest.mark.parametrize("isa", native.require("test").supported_instruction_sets())
def test_shapes_on_every_instruction_set(isa: str, features: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(features[0], features[1]), nn.Tanh(), nn.Linear(features[1], 3)).double()
    p, x = list(net.parameters()), torch.randn(rows, features[0], dtype=torch.float64)
    v = directions(p)
    expected = torch.autograd.grad(torch.autograd.grad(square(net(x)), p, create_graph=True), p, v)
    native.require("test").use_instruction_set(isa)
    try:
        found = torch.autograd.grad(descent.gradients(square(net(x)), p), p, v)
    finally:
        native.require("test").use_instruction_set("")
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-11)


def test_the_kernel_refuses_what_does_not_fit() -> None:
    kind = native.require("test").Perceptron32
    with pytest.raises(ValueError, match="a chain"):
        kind(2, [(3, 4, True, "relu"), (5, 1, True, "identity")], True, True, 0)
    with pytest.raises(ValueError, match="1 to 32 layers"):
        kind(2, [], True, True, 0)
    with pytest.raises(ValueError, match="one of seven"):
        kind(2, [(3, 4, True, "swish")], True, True, 0)
    with pytest.raises(ValueError, match="no derivatives"):
        kind(2, [(3, 4, True, "gelu")], True, True, 0)
    net = kind(2, [(3, 1, False, "identity")], True, True, 0)
    x, w, y, ds = torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 1), torch.empty(net.elements)
    assert net.descend(([x], None, y, 0 * y), [w, None], [2 * torch.ones(1, 3), None], ds)
    for passed in (([x[:1]], None, y, y), ([x.double()], None, y, y), ([x], y, y, y), ([x, x], None, y, y)):
        with pytest.raises(ValueError, match="perceptron: "):
            net.descend(passed, [w, None], [w, None], ds)
    with pytest.raises(ValueError, match="perceptron: "):
        net.pull_back(([x], None, y, y), [w, None], ds[:1], [w, None], None)
    with pytest.raises(ValueError, match="a weight and a bias"):
        net.pull_back(([x], None, y, y), [w, None], ds, [w], None)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_states_in_which_autograd_does_it(context: Callable[[], Any]) -> None:
    net = Plain().float()
    with torch.enable_grad():
        loss = square(net(inputs(torch.float32)))
    with context():
        assert recognised(loss, list(net.parameters())) is None
        found = descent.gradients(loss, list(net.parameters()))
    assert all(g is not None and g.requires_grad for g in found)


def test_transforms_of_functions() -> None:
    net = network()
    names = [name for name, _ in net.named_parameters()]

    def norm(p: tuple[Tensor, ...]) -> Tensor:
        out = torch.func.functional_call(net, dict(zip(names, p, strict=True)), inputs())
        return sum(g.square().sum() for g in descent.gradients(square(out), p))  # type: ignore[union-attr,return-value]

    p = list(net.parameters())
    g = torch.autograd.grad(square(net(inputs())), p, create_graph=True)
    expected = torch.autograd.grad(sum(h.square().sum() for h in g), p)
    close(norm(tuple(p)), sum(h.square().sum() for h in g))  # type: ignore[arg-type]
    found = torch.autograd.grad(norm(tuple(p)), p)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("create_graph", [False, True])
def test_many_cotangents_at_once(create_graph: bool) -> None:
    net, x = network(), inputs()
    p = list(net.parameters())
    several = [torch.stack(vs) for vs in zip(*(directions(p, seed) for seed in range(3)), strict=True)]
    of = descent.gradients(square(net(x)), p), torch.autograd.grad(square(net(x)), p, create_graph=True)
    found, expected = (torch.autograd.grad(g, p, several, create_graph=create_graph, is_grads_batched=True) for g in of)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-11)
        assert a.requires_grad == create_graph


def test_a_backward_under_autocast() -> None:
    net = network().float()
    p, x = list(net.parameters()), inputs(torch.float32)
    found = descent.gradients(square(net(x)), p)
    expected = torch.autograd.grad(found, p, directions(p), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        under = torch.autograd.grad(found, p, directions(p))
    assert all(torch.equal(a, b) for a, b in zip(under, expected, strict=True))


def test_a_graph_that_is_gone() -> None:
    net, x = network(), inputs()
    p = list(net.parameters())
    loss = square(net(x))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        descent.gradients(loss, p)
    found = descent.gradients(square(net(x)), p)
    torch.autograd.grad(found, p, directions(p))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(found, p, directions(p))


@pytest.mark.parametrize("before", [True, False])
def test_a_tensor_that_was_changed(before: bool) -> None:
    net, x = network(), inputs()
    p = list(net.parameters())
    loss = square(net(x))
    if before:
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            descent.gradients(loss, p)
        return
    found = descent.gradients(loss, p)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(found, p, directions(p))

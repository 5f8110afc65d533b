"""What no inner step changes is computed once a meta-step, and its gradient is exact all the same."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.engine.profile import collect
from fastmeta.ops.linear.op import Linear
from tests.oracle import maml_loop, relative_error

T, WAYS, EXACT = 3, 3, 1e-10

without_extension = pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")
EXECUTORS = [pytest.param("native", marks=without_extension), "reference"]


class Branches(nn.Module):
    """Features that nothing adapts, read by a layer that adapts and, before and after it, by layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(4, 8), nn.Linear(8, WAYS)
        self.before, self.inner, self.after = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        early = torch.tanh(self.before(h))
        moving = torch.tanh(self.inner(h + early))
        late = torch.tanh(self.after(h + early))
        return self.head(moving + late + h)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, WAYS))


def with_chance() -> nn.Module:
    """A draw that all but never changes anything stands before a layer that does not adapt: every step draws anew."""
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(1e-13), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, WAYS))


def convolutions() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(b, track_running_stats=False)
        return [nn.Conv2d(a, b, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(2, 5), *block(5, 6), *block(6, 4), nn.Flatten(), nn.Linear(4, WAYS))


VECTORS, IMAGES = (4,), (2, 8, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "head": (perceptron, VECTORS, ["4.*"]),
    "middle": (perceptron, VECTORS, ["2.*"]),
    "a bias alone": (perceptron, VECTORS, ["2.bias"]),
    "first": (perceptron, VECTORS, ["0.*"]),
    "branches": (Branches, VECTORS, ["inner.*"]),
    "branches and head": (Branches, VECTORS, ["inner.*", "head.bias"]),
    "head over convolutions": (convolutions, IMAGES, ["13.*"]),
    "last block": (convolutions, IMAGES, ["8.*", "9.*"]),
    "middle block": (convolutions, IMAGES, ["4.*"]),
}


def problem(make: Callable[[], nn.Module], shape: tuple[int, ...]):
    torch.manual_seed(0)
    model = make().double()

    def batch(n: int):
        return torch.randn(T, n, *shape, dtype=torch.float64), torch.randint(WAYS, (T, n))

    return model, batch(5), batch(6)


def adapting(model: nn.Module, patterns: list[str]) -> list[str]:
    maml = fm.MAML(model, F.cross_entropy, parameters=patterns)
    return list(maml._packing(maml._objective.parameters()).names)


shared = functools.cache(problem)  # for tests that leave the model as it is: one trace serves them


@functools.cache
def right(case: str, steps: int, first_order: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    make, shape, patterns = CASES[case]
    model, support, query = shared(make, shape)
    return maml_loop(model, F.cross_entropy, support, query, 0.3, steps, first_order, adapting(model, patterns))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_meta_gradient_is_exact(case: str, steps: int, executor: str) -> None:
    make, shape, patterns = CASES[case]
    model, support, query = shared(make, shape)
    for first_order in (False, True):
        truth = right(case, steps, first_order)
        maml = fm.MAML(
            model, F.cross_entropy, 0.3, steps, first_order=first_order, parameters=patterns, executor=executor
        )
        loss, gradients = maml.value_and_grad(fm.TaskBatch(support, query))
        assert relative_error(loss, truth[0]) <= EXACT
        assert relative_error(gradients, truth[3]) <= EXACT
        again = maml(fm.TaskBatch(support, query))
        again.loss.backward()
        assert relative_error({n: p.grad for n, p in model.named_parameters()}, truth[3]) <= EXACT
        assert relative_error(again.logits, truth[2]) <= EXACT
        model.zero_grad()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("case", ["head", "middle", "branches", "last block"])
@pytest.mark.parametrize("kind", ["a step", "a parameter", "a step and parameter"])
def test_learned_rates_get_their_gradient(case: str, kind: str, executor: str) -> None:
    make, shape, patterns = CASES[case]
    model, support, query = shared(make, shape)
    names = adapting(model, patterns)
    steps = 3

    def rate(first: float) -> Tensor:
        values = [first, first + 0.1, first - 0.05][: steps if "step" in kind else 1]
        return torch.tensor(values, dtype=torch.float64).squeeze().requires_grad_()

    if kind == "a parameter":
        lr = {name: rate(0.1 + 0.05 * i) for i, name in enumerate(names)}
        truth = maml_loop(model, F.cross_entropy, support, query, lr, steps, adapted_names=names)[3]
    else:
        lr = rate(0.2)
        reference = fm.MAML(model, F.cross_entropy, lr, steps, parameters=patterns, engine="autodiff")
        truth = reference.value_and_grad(fm.TaskBatch(support, query))[1]
    maml = fm.MAML(model, F.cross_entropy, lr, steps, parameters=patterns, executor=executor)
    gradients = maml.value_and_grad(fm.TaskBatch(support, query))[1]
    assert relative_error(gradients, truth) <= EXACT


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_body_that_is_frozen(executor: str) -> None:
    model, support, query = problem(convolutions, IMAGES)
    for parameter in model[:12].parameters():
        parameter.requires_grad_(False)
    maml = fm.MAML(model, F.cross_entropy, 0.3, 3, executor=executor)
    gradients = maml.value_and_grad(fm.TaskBatch(support, query))[1]
    truth = maml_loop(model, F.cross_entropy, support, query, 0.3, 3)[3]
    assert set(gradients) == {"13.weight", "13.bias"}
    assert relative_error(gradients, truth) <= EXACT


def test_what_chance_reaches_is_computed_at_every_step() -> None:
    model, support, query = problem(with_chance, VECTORS)
    names = ["5.weight", "5.bias"]
    maml = fm.MAML(model, F.cross_entropy, 0.3, 3, parameters=names)
    tasks = fm.TaskBatch(support, query)
    gradients = maml.value_and_grad(tasks)[1]
    assert (
        relative_error(gradients, maml_loop(model, F.cross_entropy, support, query, 0.3, 3, False, names)[3]) <= EXACT
    )
    _, programs = maml.prepare(tasks)
    once = [i.op.name for i in programs.support.instructions if i.invariant and i.op.name != "view"]
    assert once == ["linear", "activation"]
    # and a draw that does change something differs from step to step
    model[2].p = 0.5
    maml.retrace()
    losses = fm.MAML(model, F.cross_entropy, 0.0, 3, parameters=names)(tasks).support_losses
    assert not torch.equal(losses[0], losses[1])


def test_the_reference_executor_runs_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, support, query = problem(perceptron, VECTORS)
    calls: Counter[tuple[str, int]] = Counter()
    maps = "forward", "backward", "tangent", "tangent_backward"

    def counted(name: str) -> Callable[..., object]:
        own = getattr(Linear, name)

        def count(self: Linear, *given: object) -> object:
            calls[name, self.fan_in] += 1
            return own(self, *given)

        return count

    for name in maps:
        monkeypatch.setattr(Linear, name, counted(name))
    maml = fm.MAML(model, F.cross_entropy, 0.3, 3, parameters=["4.*"], executor="reference", chunk_size=T)
    maml.value_and_grad(fm.TaskBatch(support, query))
    for body in (4, 9):  # on the support and on the query set
        assert [calls[name, body] for name in maps] == [2, 2, 0, 0]
    assert [calls[name, 7] for name in maps] == [4, 4, 3, 3]


@without_extension
def test_the_native_executor_runs_them_once() -> None:
    model, support, query = problem(perceptron, VECTORS)
    maml = fm.MAML(model, F.cross_entropy, 0.3, 3, parameters=["4.*"], executor="native")
    tasks = fm.TaskBatch(support, query)
    maml.value_and_grad(tasks)
    with collect() as profile:
        maml.value_and_grad(tasks)
    calls = {(r.module, r.phase, r.map): r.calls for r in profile.records}
    for body in ("0", "2"):
        assert calls[body, "support", "forward"] == calls[body, "support", "backward"] == T
        assert (body, "support", "tangent") not in calls
        assert (body, "support", "tangent_backward") not in calls
    assert calls["4", "support", "forward"] == calls["4", "support", "tangent_backward"] == 3 * T


def test_running_statistics_follow_every_pass() -> None:
    """A training pass over a body that does not adapt still moves its statistics, at every step as a loop does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WAYS)).double()
    support = torch.randn(T, 5, 4, dtype=torch.float64), torch.randint(WAYS, (T, 5))
    query = torch.randn(T, 6, 4, dtype=torch.float64), torch.randint(WAYS, (T, 6))
    moved = {}
    for engine in ("program", "autodiff"):
        maml = fm.MAML(model, F.cross_entropy, 0.3, 3, parameters=["3.*"], update_running_stats=True, engine=engine)
        model[1].reset_running_stats()
        maml(fm.TaskBatch(support, query))
        moved[engine] = {name: b.clone() for name, b in model.named_buffers()}
    assert relative_error(moved["program"], moved["autodiff"]) <= EXACT


@pytest.mark.parametrize("executor", EXECUTORS)
def test_explain_says_what_runs_once(executor: str) -> None:
    model, support, query = problem(perceptron, VECTORS)
    maml = fm.MAML(model, F.cross_entropy, 0.3, 3, parameters=["4.*"], executor=executor)
    told = maml.explain(fm.TaskBatch(support, query))
    once = [row.module for row in told.rows if "runs once" in row.reason]
    assert {"0", "2"} <= set(once)
    assert "4" not in once
    assert told.kept_once > 0
    assert "once:" in str(told)
    everything = fm.MAML(model, F.cross_entropy, 0.3, 3, executor=executor).explain(fm.TaskBatch(support, query))
    assert everything.kept_once == 0
    assert told.flops < everything.flops / 2

"""Adaptation by native passes, one task after the other: the weights of an explicit loop, under any rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from fastmeta.core.rates import Rates
from fastmeta.engine import cut, native_passes
from fastmeta.engine.profile import collect
from fastmeta.learner.models import conv4
from tests.engine.test_inner_rules import network_and_tasks
from tests.engine.test_profile import Profile
from tests.oracle import relative_error

pytestmark = pytest.mark.usefixtures("extension")
EXACT = 1e-11  # float64 rounding of a few thousand operations


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native wherever it can be."""
    monkeypatch.setattr(native_passes, "passes_pay", lambda *_: True)


def images() -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    sets = [(torch.randn(3, n, 1, 16, 16).double(), torch.randint(4, (3, n))) for n in (4, 6)]
    return conv4(1, 4, 8, 16).double(), fm.TaskBatch(*sets)


def normed() -> nn.Module:
    """With running statistics."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 14 * 14, 4)
    model = nn.Sequential(*layers).double()
    model[1].running_mean.normal_()
    return model


# Made once each: no rule changes a model, and so one trace serves all.
PROBLEMS: dict[str, Callable[[], tuple[nn.Module, fm.TaskBatch]]] = {
    "linear layers": functools.cache(lambda: network_and_tasks(4, 5, 3)),
    "convolutions": functools.cache(images),
}
RULES: dict[str, Callable[[], Any]] = {
    "plain": lambda: fm.inner.SGD(0.1),
    "one rate a step": lambda: fm.inner.SGD(torch.tensor([0.1, 0.2, 0.05])),
    "momentum": lambda: fm.inner.SGD(0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda: fm.inner.Adam(0.05, eps=1e-2),
    "groups": lambda: fm.inner.Groups({"*.bias": fm.inner.Adam(0.05, eps=1e-2), "*": fm.inner.SGD(0.1, 0.9)}),
}


def by_hand(model: nn.Module, tasks: fm.TaskBatch, inner: Any, steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """Adapted weights ``[T, *shape]`` and support losses ``[K, T]``, by torch.optim."""
    adapted, losses = [], []
    for t in range(len(tasks)):
        x, y = tasks.task(t)[0]
        phi = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        optimizers = [
            (rule, torch_rule(rule, [p for n, p in phi.items() if of_group(inner, n) is rule]))
            for rule in ([rule for _, rule in inner.items()] if isinstance(inner, fm.inner.Groups) else [inner])
        ]
        own = []
        for k in range(steps):
            loss = F.cross_entropy(functional_call(model, phi, (x,)), y)
            for rule, optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = float(rule.lr if not isinstance(rule.lr, Tensor) else rule.lr[k])
            for p, d in zip(phi.values(), torch.autograd.grad(loss, list(phi.values())), strict=True):
                p.grad = d
            for _, optimizer in optimizers:
                optimizer.step()
            own.append(loss.detach())
        adapted.append({n: p.detach() for n, p in phi.items()})
        losses.append(torch.stack(own))
    return {n: torch.stack([phi[n] for phi in adapted]) for n in adapted[0]}, torch.stack(losses, 1)


def of_group(inner: Any, name: str) -> Any:
    return inner.rule_of(name) if isinstance(inner, fm.inner.Groups) else inner


def torch_rule(rule: Any, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if isinstance(rule, fm.inner.Adam):
        return torch.optim.Adam(parameters, eps=rule.eps)
    return torch.optim.SGD(parameters, momentum=rule.momentum, weight_decay=rule.weight_decay)


@pytest.mark.usefixtures("always", "traced_once")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_any_rule_takes_its_steps(problem: str, name: str) -> None:
    model, tasks = PROBLEMS[problem]()
    inner = RULES[name]()
    maml = fm.MAML(model, F.cross_entropy, inner=inner, steps=3, executor="native", chunk_size=2)
    found = maml.adapt(tasks)
    wanted, losses = by_hand(model, tasks, inner, 3)
    assert relative_error(found.parameters, wanted) <= EXACT
    assert relative_error(found.support_losses, losses) <= EXACT
    single = maml.adapt(tasks.task(1)[0])
    assert relative_error(single.parameters, {n: p[1] for n, p in wanted.items()}) <= EXACT


@pytest.mark.usefixtures("always", "traced_once")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_reptile_by_either_executor(problem: str) -> None:
    """With a query set and without, losses and outputs; ``explain`` says who."""
    model, tasks = PROBLEMS[problem]()
    for given in (tasks, fm.TaskBatch(tasks.support)):
        native, reference = (fm.Reptile(model, F.cross_entropy, 0.1, 3, executor=e) for e in ("auto", "reference"))
        ours, theirs = native(given), reference(given)
        for name in ("loss", "task_losses", "support_losses", "logits"):
            if getattr(theirs, name) is None:
                assert getattr(ours, name) is None
            else:
                assert relative_error(getattr(ours, name), getattr(theirs, name)) <= EXACT
        assert relative_error(native.value_and_grad(given)[1], reference.value_and_grad(given)[1]) <= EXACT
    table = native.explain(tasks)
    assert table.executor == "native, one task's pass after the other"
    assert {row.backend for row in table.rows} == {"native"}
    assert table.kept_per_step == table.peak == 0
    assert reference.explain(tasks).executor == "reference, because the reference executor was asked for"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", [{"clip_norm": 0.2}, {"stop": fm.inner.EarlyStop(gradient_norm=0.9)}, {}])
def test_beside_what_else_an_inner_loop_has(options: dict[str, Any]) -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    adapted = []
    for executor in ("native", "reference"):
        maml = fm.MAML(
            model, F.cross_entropy, 0.3, 4, parameters=["2.*"], executor=executor, check_finite=True, **options
        )
        adapted.append(maml.adapt(tasks))
    assert relative_error(adapted[0].parameters, adapted[1].parameters) <= EXACT
    assert relative_error(adapted[0].support_losses, adapted[1].support_losses) <= EXACT
    if "stop" in options:
        assert torch.equal(adapted[0].steps_taken, adapted[1].steps_taken)
        assert adapted[0].steps_taken.min() < 4


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("batch_norm", ["transductive", "running"])
def test_batch_norms_buffers_are_read_and_left_alone(batch_norm: Any) -> None:
    model, tasks = normed(), images()[1]
    before = {n: b.clone() for n, b in model.named_buffers()}
    adapted = [
        fm.MAML(model, F.cross_entropy, 0.1, 2, executor=e, batch_norm=batch_norm).adapt(tasks).parameters
        for e in ("native", "reference")
    ]
    assert relative_error(*adapted) <= EXACT
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_a_loss_that_is_not_finite_is_told(always: None) -> None:
    batch = torch.ones(3, 4, 4).double(), torch.zeros(3, 4, 3).double()
    maml = fm.MAML(nn.Linear(4, 3).double(), F.mse_loss, 1e200, 3, check_finite=True)
    with pytest.raises(ValueError, match="the support loss at inner step 1 must be finite, got inf for task 0"):
        maml.adapt(fm.TaskBatch(batch))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(0.5 * torch.tanh(self.layer(x)))


def reason(maml: fm.MAML, tasks: fm.TaskBatch) -> str:
    with torch.no_grad():
        work, programs = maml._prepare(tasks, None, differentiate=False, need_query=False)
    assert programs is not None
    return programs.passes.objection(work)


def test_why_all_tasks_adapt_together(always: None) -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    of_images = images()[1]
    cases = [
        (model, tasks, {}, ""),
        (model, tasks, {"executor": "reference"}, "the reference executor was asked for"),
        (model, fm.TaskBatch(tasks.support), {"micro_batches": 2}, "support sets are cut into micro-batches"),
        (normed(), of_images, {"batch_norm": "per_task"}, "tasks have running statistics of their own"),
        (Noisy(), tasks, {}, "has no native kernel"),
    ]
    sizes = tasks.support[0].shape[1]
    for net, given, options, said in cases:
        if "micro_batches" in options:
            given = fm.TaskBatch(tuple(x[:, : sizes // 2 * 2] for x in tasks.support))
        found = reason(fm.MAML(net, F.cross_entropy, 0.1, **options), given)
        assert said in found
        assert bool(said) == bool(found)
    stepwise = fm.MAMLPlusPlus(normed(), F.cross_entropy, 0.1, 2).eval()
    assert reason(stepwise, of_images) == "parameters or buffers come stepwise"


def test_query_outputs_that_are_several_come_from_the_program(always: None) -> None:
    model, tasks = network_and_tasks(4, 5, 3)

    def loss(net: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        y = net(batch["x"])
        return F.cross_entropy(y, batch["y"]), {"logits": y, "again": y}

    given = fm.TaskBatch(*({"x": x, "y": y} for x, y in (tasks.support, tasks.query)))
    native, reference = (fm.Reptile(model, loss, 0.1, 2, executor=e, engine="program") for e in ("auto", "reference"))
    with torch.no_grad():
        work, programs = native._prepare(given, None, differentiate=False)
    assert programs is not None
    assert programs.passes.objection(work) == ""
    assert not programs.passes.answers(work)
    ours, theirs = native(given), reference(given)
    assert ours.logits.keys() == {"logits", "again"}
    assert relative_error(ours.logits, theirs.logits) <= EXACT
    assert relative_error(ours.task_losses, theirs.task_losses) <= EXACT


def test_passes_are_profiled_by_their_sets(always: None) -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    reptile = fm.Reptile(model, F.cross_entropy, 0.1, 2)
    with collect(Profile()) as profile:
        reptile.value_and_grad(tasks)
    calls = {(r.phase, r.map): r.calls for r in profile.records if r.operation == "linear_block"}
    assert calls == {("support", "forward"): 6, ("support", "backward"): 6, ("query", "forward"): 3}  # of each layer


def frozen(body: nn.Module, head: nn.Module) -> nn.Module:
    return nn.Sequential(body.requires_grad_(False), head)


@pytest.mark.parametrize(
    ("build", "tasks", "threads", "pays"),
    [
        (lambda: (conv4(1, 5, 32, 28), (1, 28, 28)), 4, 1, True),
        (lambda: (conv4(1, 5, 32, 28), (1, 28, 28)), 4, 64, False),  # 63 of which would wait
        (lambda: (nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 5)), (1,)), 64, 1, False),  # calls
        (lambda: (nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 5)), (784,)), 16, 1, False),  # copies
        (lambda: (frozen(nn.Linear(2048, 2048), nn.Linear(2048, 5)), (2048,)), 4, 1, False),  # of what does not adapt
    ],
)
def test_they_are_taken_where_they_take_less_time(build: Any, tasks: int, threads: int, pays: bool) -> None:
    model, shape = build()
    batch = fm.TaskBatch((torch.randn(tasks, 5, *shape), torch.zeros(tasks, 5, dtype=torch.int64)))
    maml = fm.MAML(model, F.cross_entropy, 0.1, 3)
    with torch.no_grad():
        work, programs = maml._prepare(batch, None, differentiate=False, need_query=False)
    assert programs is not None
    assert cut.passes_pay(programs.support, work, Rates(), threads) is pays


def test_what_runs_once_for_all_steps_counts_once(extension: ModuleType) -> None:
    """Under a head that adapts alone the body's features are the same at every step, but not in passes of their own."""
    model = conv4(1, 5, 32, 28)
    batch = fm.TaskBatch((torch.randn(4, 5, 1, 28, 28), torch.zeros(4, 5, dtype=torch.int64)))
    found = []
    for steps in (1, 100):
        maml = fm.ANIL(model, F.cross_entropy, 0.1, steps)
        with torch.no_grad():
            work, programs = maml._prepare(batch, None, differentiate=False, need_query=False)
        assert programs is not None
        found.append(cut.passes_pay(programs.support, work, Rates(), 1))
    assert found == [True, False]

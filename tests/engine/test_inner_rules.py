"""Momentum, Nesterov and weight decay in the inner loop, against autograd of an explicit one."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from tests.engine.test_factored import Largest, plans
from tests.engine.test_inner_rates import SHAPES, learned, rates_of
from tests.engine.test_native import batch_of, network
from tests.oracle import maml_loop, relative_error, total_error

EXACT = 1e-11  # float64 rounding of a few thousand operations; a wrong term shows above 1e-3

RULES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.2},
    "all": {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1},
    "nesterov decay": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
}


ENGINES = ("program", "autodiff")


def tensors(rule: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every number of a rule as a tensor that is learned."""
    return {n: v if v is True else torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in rule.items()}


def network_and_tasks(*widths: int) -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    return network(*widths, activation="tanh"), batch_of(widths[0], widths[-1], "cross entropy", tasks=3)


@functools.cache  # to trace a network takes longer than all the rest
def learner(*widths: int) -> tuple[nn.Module, fm.TaskBatch, fm.MAML]:
    model, tasks = network_and_tasks(*widths)
    return model, tasks, fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1), executor="reference")


def truth(model: nn.Module, tasks: fm.TaskBatch, lr: Any, steps: int, first_order: bool, rule: dict[str, Any]):
    loop = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, steps, first_order, **rule)
    names = dict(model.named_parameters())
    return {n if n in names else f"inner.{n}": d for n, d in loop[3].items()}


@pytest.mark.parametrize("plan", ["dense", "factored", "mixed"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_exact(name: str, plan: str) -> None:
    """Fixed and learned, of first and second order, in chunks and not, by the program."""
    model, tasks, maml = learner(4, 5, 3)
    maml.plan = (("0.weight", "factored"), ("2.weight", "dense")) if plan == "mixed" else plan
    rate = torch.tensor([0.1, 0.2, 0.15, 0.1, 0.2], dtype=torch.float64, requires_grad=True)
    fixed, of_tensors = RULES[name], tensors(RULES[name])
    cases = [(fixed, 0.1, 5, False), (of_tensors, rate, 5, False), (of_tensors, rate, 1, False), (fixed, 0.1, 2, True)]
    for rule, lr, steps, maml.first_order in [*cases, (of_tensors, rate, 3, True), (of_tensors, rate, 0, False)]:
        maml.inner = fm.inner.SGD(lr, **rule)
        wanted = truth(model, tasks, lr, steps, maml.first_order, rule)
        for maml.chunk_size in (None, 2):
            assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], wanted) <= EXACT


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    widths=st.sampled_from([(4, 5, 3), (1, 3, 1), (3, 1, 2)]),
    name=st.sampled_from([*RULES]),
    wanted=st.sets(st.sampled_from(["lr", "momentum", "dampening", "weight_decay"])),
    kinds=st.tuples(*[st.sampled_from([*SHAPES])] * 2),
    plan=st.sampled_from(["dense", "factored"]),
    steps=st.integers(1, 4),
    first_order=st.booleans(),
)
def test_rules_beside_rates_of_any_shape(
    widths: tuple[int, ...],
    name: str,
    wanted: set[str],
    kinds: tuple[str, str],
    plan: str,
    steps: int,
    first_order: bool,
) -> None:
    model, tasks, maml = learner(*widths)
    rule = {n: v if n in wanted else RULES[name][n] for n, v in tensors(RULES[name]).items()}
    lr = rates_of(model, dict(zip(("0.weight", "2.weight"), kinds, strict=True)))
    lr = lr if "lr" in wanted else {n: rate.detach() for n, rate in lr.items()}
    maml.inner, maml.plan, maml.first_order = fm.inner.SGD(lr, **rule), plan, first_order
    found = maml.value_and_grad(tasks, steps=steps)[1]
    assert relative_error(found, truth(model, tasks, lr, steps, first_order, rule)) <= EXACT


def of_parameters(lr: Any = 0.1, **rule: Any) -> fm.inner.SGD:
    """A rule whose numbers are parameters."""
    made = {n: v if v is True else nn.Parameter(torch.tensor(v, dtype=torch.float64)) for n, v in rule.items()}
    return fm.inner.SGD(nn.Parameter(torch.tensor(lr, dtype=torch.float64)), **made)


@pytest.mark.parametrize("engine", ENGINES)
def test_autograd_sees_hyper_parameters(engine: str) -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    rule = of_parameters(**RULES["all"])
    maml = fm.MAML(model, F.cross_entropy, inner=rule, steps=3, engine=engine)
    names = {"inner.lr", "inner.momentum", "inner.dampening", "inner.weight_decay"}
    assert {name for name, _ in maml.named_parameters()} > names
    hyper = {name: getattr(rule, name) for name in RULES["all"]}
    wanted = truth(model, tasks, rule.lr, 3, False, hyper)
    assert relative_error(maml.value_and_grad(tasks)[1], wanted) <= EXACT
    maml(tasks).loss.mul(3).backward()
    found = {n.removeprefix("model."): p.grad / 3 for n, p in maml.named_parameters()}
    assert relative_error(found, wanted) <= EXACT


def test_other_objectives_and_parameters_that_do_not_adapt() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    gradients = []
    for options in ({"plan": "factored"}, {"engine": "autodiff"}):
        rule = of_parameters(**RULES["nesterov decay"])
        maml = fm.MAML(model, F.cross_entropy, inner=rule, steps=3, parameters=["0.*"], **options)
        out = maml(tasks)
        loss = out.task_losses[1] + out.logits.square().mean()
        named = dict(maml.named_parameters())
        gradients.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    assert relative_error(*gradients) <= EXACT


def test_adapting_takes_the_steps_of_pytorchs_optimizer() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    for rule, engine in itertools.product(RULES.values(), ENGINES):
        maml = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1, **rule), steps=4, engine=engine)
        adapted = maml.adapt(tasks)
        for t in range(2):
            net = network(4, 5, 3, activation="tanh")
            net.load_state_dict(model.state_dict())
            optimizer = torch.optim.SGD(net.parameters(), 0.1, **rule)
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(net(tasks.support[0][t]), tasks.support[1][t]).backward()
                optimizer.step()
            wanted = dict(net.named_parameters())
            assert relative_error({n: p[t] for n, p in adapted.parameters.items()}, wanted) <= EXACT


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
@pytest.mark.parametrize("plan", ["dense", "factored"])
def test_activations_computed_again(plan: str) -> None:
    model, tasks, maml = learner(4, 5, 3)
    maml.first_order, maml.chunk_size, maml.plan = False, None, plan
    for rule in (RULES["all"], tensors(RULES["all"])):
        maml.inner = fm.inner.SGD(0.1, **rule)
        maml.memory_budget = 1  # byte: nothing fits
        assert maml.explain(tasks, steps=4).recomputes
        found = maml.value_and_grad(tasks, steps=4)[1]
        maml.memory_budget = None
        assert relative_error(found, truth(model, tasks, 0.1, 4, False, rule)) <= EXACT


def test_changes_of_the_rule_are_noticed() -> None:
    model, tasks, maml = learner(4, 5, 3)
    maml.first_order, maml.chunk_size, maml.plan = False, None, "auto"
    momentum = torch.tensor(0.5, dtype=torch.float64)
    rule = maml.inner = fm.inner.SGD(0.1, momentum=0.9)

    def check(**wanted: Any) -> None:
        for _ in range(2):
            found = maml.value_and_grad(tasks, steps=3)[1]
            assert relative_error(found, truth(model, tasks, rule.lr, 3, False, wanted)) <= EXACT

    check(momentum=0.9)
    rule.momentum = momentum
    check(momentum=0.5)
    momentum.fill_(0.3)
    check(momentum=0.3)
    rule.weight_decay = 0.1
    check(momentum=0.3, weight_decay=0.1)
    rule.momentum, rule.lr = 0.0, 0.2
    check(weight_decay=0.1)
    rule.weight_decay, rule.momentum, rule.nesterov = 0.0, 0.6, True
    check(momentum=0.6, nesterov=True)
    rule.nesterov, rule.dampening = False, 0.5
    check(momentum=0.6, dampening=0.5)


def test_a_parameter_that_the_loss_does_not_use_shrinks() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    model.register_parameter("idle", nn.Parameter(torch.randn(2, dtype=torch.float64)))
    inner = fm.inner.SGD(0.1, momentum=0.9, weight_decay=0.5)
    mamls = [fm.MAML(model, F.cross_entropy, inner=inner, steps=2, allow_unused=True, engine=e) for e in ENGINES]
    found = [maml.adapt(tasks).parameters["idle"] for maml in mamls]
    step = 1 - 0.1 * 0.5
    factor = step - 0.1 * (0.9 * 0.5 + 0.5 * step)
    for idle in found:
        assert relative_error(idle, factor * model.idle.detach().expand(3, -1)) <= EXACT
    assert relative_error(*(maml.value_and_grad(tasks)[1] for maml in mamls)) <= EXACT


@pytest.mark.parametrize("name", ["nesterov decay", "all"])
def test_float32_and_no_weight_of_a_task(name: str) -> None:
    torch.manual_seed(0)
    width = 300
    model = network(width, width, width, 5, dtype=torch.float32)
    tasks = batch_of(width, 5, "cross entropy", (3, 4), tasks=6, dtype=torch.float32)
    rule, rate = tensors(RULES[name], torch.float32), learned((), "one", torch.float32)
    maml = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(rate, **rule), steps=3)
    assert plans(maml, tasks)[:2] == ["factored", "factored"]
    with Largest() as largest:
        found = maml.value_and_grad(tasks)[1]
    assert largest.elements < 2 * width * width
    rate = rate.detach().double().requires_grad_()
    double = {n: v if v is True else v.detach().double().requires_grad_() for n, v in rule.items()}
    of_doubles = fm.TaskBatch(*((x.double(), y) for x, y in (tasks.support, tasks.query)))
    wanted = truth(model.double(), of_doubles, rate, 3, False, double)
    assert total_error(found, wanted) <= 1e-4  # float32 rounding of sums of a few hundred terms, three steps deep


def test_executors_say_why_they_do_not_run() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    maml = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1, 0.9, weight_decay=0.1))
    table = maml.explain(tasks)
    assert "along the gradient alone, and the rule has momentum and weight decay" in table.executor
    assert "vectors of the inner rule" not in table.kept
    maml.executor = "native"
    with pytest.raises(RuntimeError, match="the rule has momentum and weight decay"):
        maml.value_and_grad(tasks)
    size = 3 * 8 * sum(p.numel() for p in model.parameters())
    maml.executor, maml.plan = "reference", "dense"
    for name, vectors in {
        "nesterov decay": 2,
        "all": 2,
        "decay": 1,
    }.items():  # s and b, b and d, s; phi is there anyway
        maml.inner = of_parameters(**RULES[name])
        assert maml.explain(tasks).kept["vectors of the inner rule"] == vectors * size


def test_a_plain_rule_runs_as_a_rate_by_itself_does() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    ours, alone = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1)), fm.MAML(model, F.cross_entropy, lr=0.1)
    assert ours.explain(tasks).executor == alone.explain(tasks).executor
    (value, found), (wanted, gradients) = ours.value_and_grad(tasks), alone.value_and_grad(tasks)
    assert torch.equal(value, wanted)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_what_is_not_used_has_a_gradient_of_zero() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    rule = fm.inner.SGD(0.1, dampening=nn.Parameter(torch.tensor(0.5)), weight_decay=nn.Parameter(torch.tensor(0.1)))
    gradients = fm.MAML(model, F.cross_entropy, inner=rule).value_and_grad(tasks)[1]
    assert gradients["inner.dampening"] == 0
    assert gradients["inner.weight_decay"] != 0


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": "fast"}, TypeError, "SGD: lr must be a number or a tensor, got str"),
    ({"lr": {"0.weight": None}}, TypeError, r"SGD: lr\['0.weight'\] must be a number or a tensor, got NoneType"),
    ({"momentum": True}, TypeError, "SGD: momentum must be a number or a tensor, got bool"),
    ({"weight_decay": torch.tensor(1)}, TypeError, "SGD: weight_decay must be a floating-point tensor"),
    ({"momentum": -0.1}, ValueError, "SGD: momentum must be finite and not negative, got -0.1"),
    ({"weight_decay": float("nan")}, ValueError, "SGD: weight_decay must be finite and not negative, got nan"),
    ({"dampening": torch.rand(2)}, ValueError, r"SGD: dampening must be a number or of shape \[\], got \(2,\)"),
    ({"nesterov": 1}, TypeError, "SGD: nesterov must be a bool, got int"),
    ({"nesterov": True}, ValueError, "SGD: momentum must not be 0 with nesterov, got 0.0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "SGD: dampening must be 0 with nesterov"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_rules_that_cannot_be(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fm.inner.SGD(**{"lr": 0.1, **settings})


def test_a_rate_is_given_once() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    with pytest.raises(ValueError, match=r"MAML: lr must be None beside inner, got 0.1; give the rate to inner"):
        fm.MAML(model, F.cross_entropy, lr=0.1, inner=fm.inner.SGD(0.1))
    with pytest.raises(TypeError, match=r"MAML: inner must be a rule of fastmeta.inner, got float"):
        fm.MAML(model, F.cross_entropy, inner=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MAML: lr must have one entry for every adapting parameter"):
        fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD({"0.weight": 0.1}))
    maml = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1))
    maml.lr = 0.2
    with pytest.raises(ValueError, match="lr must be None beside inner"):
        maml.value_and_grad(tasks)
    maml.lr = maml.inner = None
    with pytest.raises(ValueError, match="MAML: lr must be given where there is no inner, got None"):
        maml.value_and_grad(tasks)


def test_a_rule_shows_its_settings() -> None:
    assert repr(fm.inner.SGD(0.1, 0.9)) == "SGD(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.0, nesterov=False)"

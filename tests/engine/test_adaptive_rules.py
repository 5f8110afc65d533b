"""RMSprop, Adagrad, Adam and AdamW in the inner loop, against autograd of an explicit one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.engine.test_inner_rates import rates_of
from tests.engine.test_native import batch_of, network
from tests.engine.test_rows import LENGTH, ROWS, WAYS, Words
from tests.oracle import maml_loop, relative_error, total_error

pytestmark = pytest.mark.usefixtures("traced_once")
EXACT = 1e-10  # float64 rounding, which the division by small roots makes larger; a wrong term shows above 1e-4
ENGINES = ("program", "autodiff")

# Of each rule its class, which numbers it has (all but flags are learned in some test) and other settings.
RULES: dict[str, tuple[str, dict[str, float], dict[str, Any]]] = {
    "rmsprop": ("RMSprop", {"alpha": 0.8, "eps": 1e-3}, {}),
    "rmsprop, all": (
        "RMSprop",
        {"alpha": 0.7, "eps": 1e-2, "eps_root": 1e-4, "momentum": 0.6, "weight_decay": 0.1},
        {"centered": True},
    ),
    "rmsprop, momentum": ("RMSprop", {"alpha": 0.8, "eps": 0.0, "eps_root": 1e-3, "momentum": 0.9}, {}),
    "rmsprop, centred": ("RMSprop", {"alpha": 0.8, "eps": 1e-2, "eps_root": 1e-3}, {"centered": True}),
    "adagrad": ("Adagrad", {"eps": 1e-3, "lr_decay": 0.0}, {}),
    "adagrad, all": (
        "Adagrad",
        {"eps": 1e-3, "eps_root": 1e-4, "lr_decay": 0.3, "weight_decay": 0.1},
        {"initial_accumulator_value": 0.01},
    ),
    "adam": ("Adam", {"beta1": 0.9, "beta2": 0.999, "eps": 1e-3}, {}),
    "adam, all": ("Adam", {"beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "eps_root": 1e-4, "weight_decay": 0.1}, {}),
    "adam, amsgrad": ("Adam", {"beta1": 0.6, "beta2": 0.3, "eps": 1e-2, "weight_decay": 0.1}, {"amsgrad": True}),
    "adam, default eps": ("Adam", {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}, {}),
    "adamw": ("AdamW", {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.2}, {}),
    "adamw, amsgrad": ("AdamW", {"beta1": 0.8, "beta2": 0.3, "eps": 1e-3, "weight_decay": 0.2}, {"amsgrad": True}),
}


def configured(name: str, lr: Any, numbers: dict[str, Any]) -> fm.inner.Adam:
    kind, _, others = RULES[name]
    numbers = dict(numbers)
    if "beta1" in numbers:
        numbers["betas"] = numbers.pop("beta1"), numbers.pop("beta2")
    return getattr(fm.inner, kind)(lr, **numbers, **others)


def update_of(name: str, numbers: dict[str, Any]) -> Callable[..., tuple[Tensor, Any]]:
    """The step as ``torch.optim`` writes it, with ``eps_root`` in the root."""
    kind, _, others = RULES[name]
    h = {"weight_decay": 0.0, "eps_root": 0.0, "momentum": 0.0, "lr_decay": 0.0, **others, **numbers}

    def adam(p: Tensor, g: Tensor, state: Any, lr: Any) -> tuple[Tensor, Any]:
        step, m, v, most = state or (0, torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p))
        step += 1
        if kind == "AdamW":
            p = p * (1 - lr * h["weight_decay"])
        else:
            g = g + h["weight_decay"] * p
        m = m * h["beta1"] + g * (1 - h["beta1"])
        v = v * h["beta2"] + g * g * (1 - h["beta2"])
        most = torch.maximum(most, v)
        root = (most if h.get("amsgrad") else v) / (1 - h["beta2"] ** step) + h["eps_root"]
        return p - lr / (1 - h["beta1"] ** step) * m / (root.sqrt() + h["eps"]), (step, m, v, most)

    def rmsprop(p: Tensor, g: Tensor, state: Any, lr: Any) -> tuple[Tensor, Any]:
        square, mean, buffer = state or (torch.zeros_like(p),) * 3
        g = g + h["weight_decay"] * p
        square = square * h["alpha"] + (1 - h["alpha"]) * g * g
        mean = mean + (1 - h["alpha"]) * (g - mean)
        variance = square - mean * mean if h.get("centered") else square
        buffer = buffer * h["momentum"] + g / ((variance + h["eps_root"]).sqrt() + h["eps"])
        return p - lr * buffer, (square, mean, buffer)

    def adagrad(p: Tensor, g: Tensor, state: Any, lr: Any) -> tuple[Tensor, Any]:
        step, total = state or (0, torch.full_like(p, h.get("initial_accumulator_value", 0.0)))
        g = g + h["weight_decay"] * p
        total = total + g * g
        return p - lr / (1 + step * h["lr_decay"]) * g / ((total + h["eps_root"]).sqrt() + h["eps"]), (step + 1, total)

    return {"Adam": adam, "AdamW": adam, "RMSprop": rmsprop, "Adagrad": adagrad}[kind]


def tensors(numbers: dict[str, float], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every number as a tensor that is learned."""
    return {n: torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in numbers.items()}


def network_and_tasks(*widths: int) -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    return network(*widths, activation="tanh"), batch_of(widths[0], widths[-1], "cross entropy", tasks=3)


@functools.cache  # to trace a network takes longer than all the rest
def learner() -> tuple[nn.Module, fm.TaskBatch, fm.MAML]:
    model, tasks = network_and_tasks(4, 5, 3)
    return model, tasks, fm.MAML(model, F.cross_entropy, inner=fm.inner.Adam(0.1))


def truth(
    model: nn.Module, tasks: fm.TaskBatch, lr: Any, steps: int, first_order: bool, name: str, numbers: dict[str, Any]
) -> dict[str, Tensor]:
    hyper = {n: v for n, v in numbers.items() if isinstance(v, Tensor)}
    loop = maml_loop(
        model,
        F.cross_entropy,
        tasks.support,
        tasks.query,
        lr,
        steps,
        first_order,
        update=update_of(name, numbers),
        hyper=hyper,
    )
    names = dict(model.named_parameters())
    return {n if n in names else f"inner.{n}": d for n, d in loop[3].items()}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_exact(name: str) -> None:
    """Fixed and learned, of first and second order, in chunks and not, by the program."""
    model, tasks, maml = learner()
    fixed, learned = RULES[name][1], tensors(RULES[name][1])
    rate = torch.tensor([0.02, 0.04, 0.03], dtype=torch.float64, requires_grad=True)
    cases = [(fixed, 0.03, 2, False), (learned, rate, 3, False), (learned, rate, 2, True), (fixed, 0.03, 1, True)]
    for numbers, lr, steps, maml.first_order in cases:
        maml.inner = configured(name, lr, numbers)
        wanted = truth(model, tasks, lr, steps, maml.first_order, name, numbers)
        for maml.chunk_size in (None, 2):
            assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], wanted) <= EXACT
    maml.first_order, maml.chunk_size = False, None
    found = maml.value_and_grad(tasks, steps=0)[1]
    assert relative_error(found, truth(model, tasks, 0.03, 0, False, name, fixed)) <= EXACT


@pytest.mark.parametrize("name", ["rmsprop, all", "adagrad, all", "adam, amsgrad", "adamw"])
def test_rates_of_any_shape(name: str) -> None:
    """One rate a parameter, a row, a column, an element, alone learned and beside the other numbers."""
    model, tasks, maml = learner()
    learned = tensors(RULES[name][1])
    cases = [({"0.weight": "row", "2.weight": "column"}, "element", learned), ({}, "one", RULES[name][1])]
    for kinds, others, numbers in [*cases, ({"0.weight": "element"}, "one", learned)]:
        lr = rates_of(model, kinds, others)
        maml.inner = configured(name, lr, numbers)
        found = maml.value_and_grad(tasks, steps=2)[1]
        assert relative_error(found, truth(model, tasks, lr, 2, False, name, numbers)) <= EXACT


def of_parameters(name: str, lr: float = 0.03, dtype: torch.dtype = torch.float64) -> Any:
    """A rule whose numbers are parameters."""
    numbers = {n: nn.Parameter(torch.tensor(v, dtype=dtype)) for n, v in RULES[name][1].items()}
    return configured(name, nn.Parameter(torch.tensor(lr, dtype=dtype)), numbers)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["rmsprop, all", "adagrad, all", "adam, amsgrad", "adamw"])
def test_autograd_sees_hyper_parameters(name: str, engine: Any) -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    rule = of_parameters(name)
    maml = fm.MAML(model, F.cross_entropy, inner=rule, steps=3, engine=engine)
    numbers = {n: getattr(rule, n) for n in RULES[name][1]}
    assert {n for n, _ in maml.named_parameters()} > {"inner.lr", *(f"inner.{n}" for n in numbers)}
    wanted = truth(model, tasks, rule.lr, 3, False, name, numbers)
    assert relative_error(maml.value_and_grad(tasks)[1], wanted) <= EXACT
    maml(tasks).loss.mul(3).backward()
    found = {n.removeprefix("model."): p.grad / 3 for n, p in maml.named_parameters()}
    assert relative_error(found, wanted) <= EXACT


@pytest.mark.parametrize("wanted", ["lr", "beta2", "eps_root"])
def test_one_number_alone_is_learned(wanted: str) -> None:
    model, tasks, maml = learner()
    numbers = {n: v.detach().requires_grad_(n == wanted) for n, v in tensors(RULES["adam, all"][1]).items()}
    rate = torch.tensor(0.03, dtype=torch.float64, requires_grad=wanted == "lr")
    maml.inner = configured("adam, all", rate, numbers)
    exact = truth(model, tasks, rate, 2, False, "adam, all", numbers)
    assert relative_error(maml.value_and_grad(tasks, steps=2)[1], exact) <= EXACT
    learned = dict(model.named_parameters()) | maml.inner.learned()
    assert learned.keys() - dict(model.named_parameters()) == {wanted}
    found = torch.autograd.grad(maml(tasks, steps=2).loss, list(learned.values()))
    exact = {n.removeprefix("inner."): d for n, d in exact.items()}
    assert relative_error(dict(zip(learned, found, strict=True)), exact) <= EXACT


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rmsprop, all", "adagrad, all", "adamw, amsgrad"])
def test_on_a_gpu(name: str) -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    here = fm.MAML(model, F.cross_entropy, inner=of_parameters(name), steps=3).value_and_grad(tasks)[1]
    maml = fm.MAML(model.cuda(), F.cross_entropy, inner=of_parameters(name).cuda(), steps=3)
    for _ in range(3):  # the last one is replayed from a graph
        found = maml.value_and_grad(tasks.to(device="cuda"))[1]
        assert relative_error({n: d.cpu() for n, d in found.items()}, here) <= EXACT


@pytest.mark.parametrize("name", RULES)
def test_adapting_takes_the_steps_of_pytorchs_optimizer(name: str) -> None:
    kind, numbers, others = RULES[name]
    numbers = {n: v for n, v in numbers.items() if n != "eps_root"}
    model, tasks = network_and_tasks(4, 5, 3)
    settings = {n: v for n, v in numbers.items() if "beta" not in n} | others
    if "beta1" in numbers:
        settings["betas"] = numbers["beta1"], numbers["beta2"]
    net = network(4, 5, 3, activation="tanh")
    net.load_state_dict(model.state_dict())
    optimizer = getattr(torch.optim, kind)(net.parameters(), 0.03, **settings)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(tasks.support[0][1]), tasks.support[1][1]).backward()
        optimizer.step()
    wanted = dict(net.named_parameters())
    for engine in ENGINES:
        inner = getattr(fm.inner, kind)(0.03, **settings)
        maml = fm.MAML(model, F.cross_entropy, inner=inner, steps=4, engine=engine)
        adapted = maml.adapt(tasks).parameters
        assert relative_error({n: p[1] for n, p in adapted.items()}, wanted) <= EXACT


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
@pytest.mark.parametrize("name", ["adam, all", "rmsprop, all"])
def test_activations_computed_again(name: str) -> None:
    model, tasks, maml = learner()
    for numbers in (RULES[name][1], tensors(RULES[name][1])):
        maml.inner = configured(name, 0.03, numbers)
        maml.memory_budget = 1  # byte: nothing fits
        assert maml.explain(tasks, steps=3).recomputes
        found = maml.value_and_grad(tasks, steps=3)[1]
        maml.memory_budget = None
        assert relative_error(found, truth(model, tasks, 0.03, 3, False, name, numbers)) <= EXACT


def test_other_objectives_and_parameters_that_do_not_adapt() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    gradients = []
    for engine in ENGINES:
        rule = of_parameters("adam, all")
        maml = fm.MAML(model, F.cross_entropy, inner=rule, steps=3, parameters=["0.*"], engine=engine)
        out = maml(tasks)
        loss = out.task_losses[1] + out.logits.square().mean()
        named = dict(maml.named_parameters())
        gradients.append(dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))
    assert relative_error(*gradients) <= EXACT


@pytest.mark.parametrize("name", ["adam", "rmsprop, all"])
def test_float32(name: str) -> None:
    torch.manual_seed(0)
    model = network(20, 30, 3, activation="tanh", dtype=torch.float32)
    tasks = batch_of(20, 3, "cross entropy", tasks=4, dtype=torch.float32)
    found = fm.MAML(model, F.cross_entropy, inner=of_parameters(name), steps=3).value_and_grad(tasks)[1]
    of_doubles = fm.TaskBatch(*((x.double(), y) for x, y in (tasks.support, tasks.query)))
    numbers = tensors(RULES[name][1])
    rate = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    wanted = truth(model.double(), of_doubles, rate, 3, False, name, numbers)
    assert total_error(found, wanted) <= 1e-4  # rounding of three steps, divided by roots of small moments


# ---- zeros

ZEROS = ["rmsprop", "rmsprop, momentum", "rmsprop, centred", "adagrad", "adam", "adam, amsgrad", "adamw"]


class Proportional(nn.Module):
    """``w x``: at ``w = 0`` and targets of zero the gradient of the squared error is zero and its Hessian is not."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


@functools.cache
def proportional() -> tuple[Proportional, fm.TaskBatch, fm.MAML]:
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    model = Proportional()
    return model, fm.TaskBatch((x, 0 * x), (x, 0 * x + 1)), fm.MAML(model, F.mse_loss, inner=fm.inner.Adam(0.01))


def at_zero(name: str, w: float, steps: int, **numbers: float) -> dict[str, Tensor]:
    """Gradients of a rule without weight decay whose support gradients are proportional to ``w``."""
    model, tasks, maml = proportional()
    own = {**RULES[name][1], **({"weight_decay": 0.0} if "weight_decay" in RULES[name][1] else {}), **numbers}
    maml.inner = configured(name, 0.01, tensors(own))
    with torch.no_grad():
        model.w.fill_(w)
    return maml.value_and_grad(tasks, steps=steps)[1]


@pytest.mark.parametrize("name", ZEROS)
def test_zero_gradients(name: str) -> None:
    """One step of gradients that are zero, H = 5: ``d phi / d w = 1 - lr * 5 * slope``; d lq / d phi = -3."""
    for eps, eps_root, slope in ((0.3, 0.0, 1 / 0.3), (0.3, 0.04, 2.0), (0.0, 0.04, 5.0), (0.0, 0.0, 0.0)):
        found = at_zero(name, 0.0, 1, eps=eps, eps_root=eps_root)
        assert relative_error(found.pop("w"), torch.tensor([-3 * (1 - 0.01 * 5 * slope)], dtype=torch.float64)) <= EXACT
        assert all(torch.isfinite(d).all() for d in found.values())
        if slope:
            beside = at_zero(name, 1e-9, 1, eps=eps, eps_root=eps_root)
            assert relative_error(beside.pop("w"), torch.tensor([-3 * (1 - 0.01 * 5 * slope)]).double()) <= 1e-6


@pytest.mark.parametrize("name", ZEROS)
@pytest.mark.parametrize("eps_root", [0.0, 1e-2])
def test_gradients_at_zero_are_the_limit(name: str, eps_root: float) -> None:
    """Three steps: what comes out at zero is what comes out of gradients that go there, from either side.

    But for the derivative by ``eps_root`` at 0, which is that at zero gradients, and has other signs beside them.
    """
    zero = at_zero(name, 0.0, 3, eps=0.2, eps_root=eps_root)
    assert zero["inner.eps_root"] == zero["inner.eps"] == 0
    if not eps_root:
        del zero["inner.eps_root"]
    for w in (1e-9, -1e-9):
        beside = at_zero(name, w, 3, eps=0.2, eps_root=eps_root)
        for n, d in zero.items():
            torch.testing.assert_close(beside[n], d, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["rmsprop, momentum", "adagrad", "adamw, amsgrad"])
def test_units_that_never_fire(name: str) -> None:
    """ReLUs whose gradients are zero at every step, with and without any eps, against the autodiff engine's steps."""
    torch.manual_seed(0)
    model, tasks = network(4, 6, 3), batch_of(4, 3, "cross entropy", tasks=3)
    with torch.no_grad():
        model[0].bias[:3] = -100.0
    for numbers in ({}, {"eps": 0.0, "eps_root": 0.0}):
        found = []
        for engine in ENGINES:
            rule = configured(name, 0.01, tensors({**RULES[name][1], **numbers}))
            maml = fm.MAML(model, F.cross_entropy, inner=rule, steps=3, engine=engine)
            found.append(maml.value_and_grad(tasks)[1])
            assert all(torch.isfinite(d).all() for d in found[-1].values())
        assert relative_error(*found) <= EXACT


@pytest.mark.parametrize("name", ["adam, default eps", "rmsprop, all"])
def test_rows_of_tables(name: str) -> None:
    """Of rows that only the query set names, and of a padding, gradients are zero."""
    torch.manual_seed(0)
    model = Words(padding=3).double()
    ids = [torch.randint(40, (3, n, LENGTH)) for n in (5, 7)]
    tasks = fm.TaskBatch(*((x, torch.randint(WAYS, x.shape[:2])) for x in ids))
    found = []
    for options in ({"plan": ROWS}, {"plan": "dense"}, {"engine": "autodiff"}):
        rule = configured(name, 0.03, tensors(RULES[name][1]))
        maml = fm.MAML(model, F.cross_entropy, inner=rule, steps=3, **options)
        if options == {"plan": ROWS}:
            assert [r.plan for r in maml.explain(tasks).rows if r.op == "embedding"] == ["factored"]
        found.append(maml.value_and_grad(tasks)[1])
    assert relative_error(found[0], found[2]) <= EXACT
    assert relative_error(found[1], found[2]) <= EXACT


# ---- configuration, messages


def test_executors_and_plans_say_why() -> None:
    model, tasks = network_and_tasks(4, 5, 3)
    parts = "first moments and second moments of gradients and weight decay"
    maml = fm.MAML(model, F.cross_entropy, inner=fm.inner.AdamW(0.1), plan="factored", steps=2)
    table = maml.explain(tasks)
    assert f"along the gradient alone, and the rule has {parts}" in table.executor
    linear = [row for row in table.rows if row.op == "linear"]
    assert {row.plan for row in linear} == {"dense"}
    reason = f"the inner rule has {parts}: its steps are of full rank, so it is formed"
    assert {row.reason for row in linear} == {reason}
    size = 3 * 8 * sum(p.numel() for p in model.parameters())
    assert table.kept["vectors of the inner rule"] == 3 * size  # g, m and v; phi is there anyway
    maml.plan = (("0.weight", "factored"),)
    with pytest.raises(ValueError, match=r"and an inner rule that adds up gradients, .*; got \['0.weight'\], possible"):
        maml.value_and_grad(tasks)
    maml.executor, maml.plan = "native", "auto"
    with pytest.raises(RuntimeError, match=f"the rule has {parts}"):
        maml.value_and_grad(tasks)


def test_changes_of_the_rule_are_noticed() -> None:
    model, tasks, maml = learner()
    numbers = dict(RULES["adam"][1])
    rule = maml.inner = configured("adam", 0.1, numbers)

    def check(name: str = "adam", **changed: Any) -> None:
        numbers.update(changed)
        for n, v in changed.items():
            setattr(rule, n, v)
        for _ in range(2):
            found = maml.value_and_grad(tasks, steps=2)[1]
            assert relative_error(found, truth(model, tasks, rule.lr, 2, False, name, numbers)) <= EXACT

    check()
    check(beta2=0.5)
    check(weight_decay=0.1)
    beta = torch.tensor(0.5, dtype=torch.float64)
    check(beta1=beta)
    beta.fill_(0.8)
    check()
    rule.amsgrad = True
    check("adam, amsgrad")


def test_a_rule_is_saved_and_loaded() -> None:
    maml, other = (fm.MAML(nn.Linear(2, 2), F.mse_loss, inner=of_parameters("adamw")) for _ in range(2))
    with torch.no_grad():
        maml.inner.beta2.fill_(0.5)
    other.load_state_dict(maml.state_dict())
    assert other.inner.beta2 == 0.5


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("Adam", {"betas": 0.9}, TypeError, "Adam: betas must be a pair, got 0.9"),
    ("AdamW", {"betas": (0.9, 1.0)}, ValueError, "AdamW: beta2 must be finite and not negative, and less than 1"),
    ("Adam", {"eps": -1e-8}, ValueError, "Adam: eps must be finite and not negative, got -1e-08"),
    ("Adam", {"amsgrad": 1}, TypeError, "Adam: amsgrad must be a bool, got int"),
    ("RMSprop", {"alpha": torch.rand(2)}, ValueError, r"RMSprop: alpha must be a number or of shape \[\], got \(2,\)"),
    ("RMSprop", {"centered": None}, TypeError, "RMSprop: centered must be a bool, got NoneType"),
    ("RMSprop", {"eps_root": "0"}, TypeError, "RMSprop: eps_root must be a number or a tensor, got str"),
    ("Adagrad", {"lr_decay": float("inf")}, ValueError, "Adagrad: lr_decay must be finite and not negative, got inf"),
    ("Adagrad", {"initial_accumulator_value": torch.ones(())}, TypeError, "initial_accumulator_value must be a number"),
    ("Adagrad", {"lr": "fast"}, TypeError, "Adagrad: lr must be a number or a tensor, got str"),
]


@pytest.mark.parametrize(("kind", "settings", "error", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_rules_that_cannot_be(kind: str, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(fm.inner, kind)(**{"lr": 0.1, **settings})


def test_a_rule_shows_its_settings() -> None:
    text = "AdamW(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-08, weight_decay=0.01, eps_root=0.0, amsgrad=False)"
    assert repr(fm.inner.AdamW(0.1)) == text

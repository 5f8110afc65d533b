"""Inner rules by parameter group, against autograd of an explicit loop in which each parameter has its group's rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from tests.engine import test_adaptive_rules as adaptive
from tests.engine import test_inner_rules as descent
from tests.engine.test_inner_rates import learned, rates_of
from tests.engine.test_native import batch_of, network
from tests.engine.test_rows import LENGTH, ROWS, WAYS, Words
from tests.oracle import maml_loop, relative_error, total_error

pytestmark = pytest.mark.usefixtures("traced_once")
EXACT = adaptive.EXACT
ENGINES = ("program", "autodiff")
RATES = (0.05, 0.02)

# Patterns and rules of two groups: neighbours, and parameters that do not follow each other in the model.
PAIRS: dict[str, dict[str, str]] = {
    "momentum, adam": {"0.*": "all", "*": "adam, all"},
    "two momenta": {"*.weight": "momentum", "*.bias": "nesterov decay"},
    "decay, rmsprop": {"2.*": "decay", "*": "rmsprop, all"},
    "adagrad, amsgrad": {"*.bias": "adagrad, all", "*": "adamw, amsgrad"},
    "two adams": {"2.weight": "adam", "*": "adam, all"},
    "rmsprop, nothing": {"0.weight": "rmsprop, momentum", "*": "plain"},
}
NUMBERS = {n: {**v} for n, v in descent.RULES.items()} | {n: v[1] for n, v in adaptive.RULES.items()} | {"plain": {}}

Update = Callable[..., tuple[Tensor, Any]]


def rule_of(name: str, lr: Any, numbers: dict[str, Any]) -> Any:
    return adaptive.configured(name, lr, numbers) if name in adaptive.RULES else fm.inner.SGD(lr, **numbers)


def update_of(name: str, numbers: dict[str, Any]) -> Update:
    if name in adaptive.RULES:
        return adaptive.update_of(name, numbers)
    h = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, **numbers}

    def sgd(p: Tensor, g: Tensor, state: Any, lr: Any) -> tuple[Tensor, Any]:
        d = g + h["weight_decay"] * p
        buffer = d if state is None else h["momentum"] * state + (1 - h["dampening"]) * d
        return p - lr * (d + h["momentum"] * buffer if h["nesterov"] else buffer), buffer

    return sgd if "momentum" in numbers else lambda p, g, _, lr: (p - lr * (g + h["weight_decay"] * p), None)


def tensors(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return descent.tensors(NUMBERS[name], dtype)


class Case:
    """Two groups: the configuration, and the loop that has each parameter's own rule."""

    def __init__(self, pair: str, lrs: tuple[Any, Any] = RATES, learn: tuple[bool, bool] = (True, True)) -> None:
        self.rules = PAIRS[pair]
        self.lrs = dict(zip(self.rules, lrs, strict=True))
        self.numbers = {
            pattern: tensors(name) if wanted else NUMBERS[name]
            for (pattern, name), wanted in zip(self.rules.items(), learn, strict=True)
        }
        self.inner = {p: rule_of(name, self.lrs[p], self.numbers[p]) for p, name in self.rules.items()}

    def truth(self, model: nn.Module, tasks: fm.TaskBatch, steps: int, first_order: bool = False) -> dict[str, Tensor]:
        names = dict(model.named_parameters())
        group = {name: next(p for p in self.rules if fnmatchcase(name, p)) for name in names}
        updates = {name: update_of(self.rules[p], self.numbers[p]) for name, p in group.items()}
        rates = {n: self.lrs[p][n] if isinstance(self.lrs[p], dict) else self.lrs[p] for n, p in group.items()}
        hyper = {f"{p}.{n}": v for p, own in self.numbers.items() for n, v in own.items() if isinstance(v, Tensor)}
        loop = maml_loop(
            model, F.cross_entropy, tasks.support, tasks.query, rates, steps, first_order, update=updates, hyper=hyper
        )
        found = {n: d for n, d in loop[3].items() if not n.startswith("lr.")}
        of_rates = dict[str, Tensor]()
        for name, p in group.items():
            if isinstance(rates[name], Tensor) and rates[name].requires_grad:  # that of a group is there for each name
                of_rates[f"{p}.lr.{name}" if isinstance(self.lrs[p], dict) else f"{p}.lr"] = loop[3][f"lr.{name}"]
        return {n if n in names else f"inner.{n}": d for n, d in (found | of_rates).items()}


def network_and_tasks() -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    return network(4, 5, 3, activation="tanh"), batch_of(4, 3, "cross entropy", tasks=3)


@functools.cache
def learner() -> tuple[nn.Module, fm.TaskBatch, fm.MAML]:
    model, tasks = network_and_tasks()
    return model, tasks, fm.MAML(model, F.cross_entropy, inner={"*": fm.inner.SGD(0.1)}, executor="reference")


def learned_rates() -> tuple[Tensor, Tensor]:
    first, second = (torch.tensor(rate, dtype=torch.float64, requires_grad=True) for rate in RATES)
    return first, second


@pytest.mark.parametrize("pair", PAIRS)
def test_every_family_is_exact(pair: str) -> None:
    """Fixed and learned, of one group and of both, of first and second order, in chunks and not, by the program."""
    model, tasks, maml = learner()
    cases = [
        (Case(pair, learn=(False, False)), 2, False),
        (Case(pair, learned_rates()), 3, False),
        (Case(pair, learn=(False, True)), 2, False),
        (Case(pair, learn=(True, False)), 2, True),
        (Case(pair, learned_rates(), (False, False)), 1, False),
        (Case(pair, learned_rates()), 0, False),
    ]
    for case, steps, maml.first_order in cases:
        maml.inner = fm.inner.Groups(case.inner)
        wanted = case.truth(model, tasks, steps, maml.first_order)
        for maml.chunk_size in (None, 2):
            assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], wanted) <= EXACT
    maml.first_order, maml.chunk_size = False, None


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pair", ["momentum, adam", "adagrad, amsgrad"])
def test_autograd_sees_what_each_group_learns(pair: str, engine: Any) -> None:
    model, tasks = network_and_tasks()
    case = Case(pair, learned_rates())
    for rule in case.inner.values():
        for name, value in rule.learned().items():
            setattr(rule, name, nn.Parameter(value.detach()))
    wanted = case.truth(model, tasks, 3)
    maml = fm.MAML(model, F.cross_entropy, inner=case.inner, steps=3, engine=engine)
    assert relative_error(maml.value_and_grad(tasks)[1], wanted) <= EXACT
    maml(tasks).loss.mul(3).backward()
    found = {n.removeprefix("model."): p.grad / 3 for n, p in maml.named_parameters()}
    wanted = {n.replace("0.*", "0/*").replace("*.bias", "*/bias"): d for n, d in wanted.items()}
    assert relative_error(found, wanted) <= EXACT


def test_the_derivative_is_that_of_differences() -> None:
    """Central differences of the meta-loss, to each hyper-parameter of each group."""
    _, tasks, maml = learner()
    case = Case("momentum, adam", learned_rates())
    maml.inner = fm.inner.Groups(case.inner)
    values = list(maml.inner.learned().values())

    def loss(*_: Tensor) -> Tensor:
        return maml(tasks, steps=3).loss

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("pair", ["momentum, adam", "rmsprop, nothing"])
def test_rates_of_any_shape_in_a_group(pair: str) -> None:
    model, tasks, maml = learner()
    every = rates_of(model, {"0.weight": "row", "2.weight": "column"}, "element")
    first = next(iter(PAIRS[pair]))
    own = [{n: r for n, r in every.items() if (fnmatchcase(n, first)) == wanted} for wanted in (True, False)]
    one = {n: learned((), "one") for n in own[1]}
    for lrs in (tuple(own), (0.05, own[1]), (own[0], learned_rates()[1]), (0.05, one)):
        case = Case(pair, lrs, (True, False))
        maml.inner = fm.inner.Groups(case.inner)
        assert relative_error(maml.value_and_grad(tasks, steps=2)[1], case.truth(model, tasks, 2)) <= EXACT


def test_one_rate_a_step_beside_one_for_all() -> None:
    model, tasks, maml = learner()
    rates = torch.tensor([0.05, 0.1], dtype=torch.float64, requires_grad=True)
    found = []
    for engine in ENGINES:
        case = Case("momentum, adam", (rates, learned_rates()[1]))
        maml = fm.MAML(model, F.cross_entropy, inner=case.inner, steps=2, engine=engine)
        assert maml.value_and_grad(tasks)[1]["inner.0.*.lr"].shape == (2,)
        found.append(maml.value_and_grad(tasks, steps=3)[1])  # the third takes the last rate
    assert relative_error(*found) <= EXACT
    short = fm.MAML(model, F.cross_entropy, inner=Case("momentum, adam", (rates, 0.1)).inner, steps=3)
    with pytest.raises(ValueError, match=r"inner\['0.\*'\].lr with one rate a step must have at least 3 rates"):
        short.value_and_grad(tasks)


@pytest.mark.parametrize(
    "groups",
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.5, "weight_decay": 0.1}),
        ("Adam", {"betas": (0.8, 0.9)}, {"betas": (0.5, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
        ("RMSprop", {"alpha": 0.5}, {"alpha": 0.9, "momentum": 0.9}),
    ],
    ids=lambda groups: groups[0],
)
def test_adapting_takes_the_steps_of_pytorchs_parameter_groups(groups: tuple[str, dict, dict]) -> None:
    kind, *settings = groups
    model, tasks = network_and_tasks()
    net = network(4, 5, 3, activation="tanh")
    net.load_state_dict(model.state_dict())
    own = [[p for n, p in net.named_parameters() if n.endswith("weight") == wanted] for wanted in (True, False)]
    pairs = zip(own, settings, RATES, strict=True)
    optimizer = getattr(torch.optim, kind)([{"params": params, "lr": lr, **more} for params, more, lr in pairs])
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(tasks.support[0][1]), tasks.support[1][1]).backward()
        optimizer.step()
    made = [getattr(fm.inner, kind)(lr, **more) for more, lr in zip(settings, RATES, strict=True)]
    for engine in ENGINES:
        inner = dict(zip(("*weight", "*"), made, strict=True))
        adapted = fm.MAML(model, F.cross_entropy, inner=inner, steps=4, engine=engine).adapt(tasks).parameters
        assert relative_error({n: p[1] for n, p in adapted.items()}, dict(net.named_parameters())) <= EXACT


def test_weights_stay_factors_where_their_own_rule_lets_them() -> None:
    model, tasks, maml = learner()
    case = Case("momentum, adam", learned_rates())
    maml.inner, maml.plan = fm.inner.Groups(case.inner), "factored"
    table = maml.explain(tasks, steps=3)
    rows = [row for row in table.rows if row.op == "linear"]
    assert [row.plan for row in rows] == ["factored", "dense"]
    assert rows[1].reason.startswith("the inner rule has first moments and second moments of gradients")
    adam = "first moments and second moments of gradients and weight decay"
    assert table.rule == f"momentum and weight decay for '0.*', {adam} for '*'"
    assert f"\ninner steps have {table.rule}\n" in str(table)
    assert relative_error(maml.value_and_grad(tasks, steps=3)[1], case.truth(model, tasks, 3)) <= EXACT
    for plan in ((("0.weight", "factored"),), (("2.weight", "factored"),)):
        case = Case("two momenta", learned_rates())
        maml.inner, maml.plan = fm.inner.Groups(case.inner), plan
        assert relative_error(maml.value_and_grad(tasks, steps=3)[1], case.truth(model, tasks, 3)) <= EXACT
    maml.plan = "auto"


def test_wide_layers_form_no_weight_of_a_task() -> None:
    torch.manual_seed(0)
    width = 300
    model = network(width, width, 5, dtype=torch.float32)
    tasks = batch_of(width, 5, "cross entropy", (3, 4), tasks=6, dtype=torch.float32)
    inner = {"*.weight": fm.inner.SGD(0.05, momentum=0.9), "*": fm.inner.Adam(0.01, eps=1e-3)}
    maml = fm.MAML(model, F.cross_entropy, inner=inner, steps=3)
    assert descent.plans(maml, tasks)[0] == "factored"
    with descent.Largest() as largest:
        maml.value_and_grad(tasks)
    assert largest.elements < 2 * width * width


def test_float32_beside_numbers_in_double_precision() -> None:
    """SGD's numbers are of the parameters' dtype, Adam's are not."""
    torch.manual_seed(0)
    model = network(20, 30, 3, activation="tanh", dtype=torch.float32)
    tasks = batch_of(20, 3, "cross entropy", tasks=4, dtype=torch.float32)
    case = Case("momentum, adam", learned_rates())
    found = [
        fm.MAML(model, F.cross_entropy, inner=case.inner, steps=3, engine=engine).value_and_grad(tasks)[1]
        for engine in ENGINES
    ]
    of_doubles = fm.TaskBatch(*((x.double(), y) for x, y in (tasks.support, tasks.query)))
    wanted = case.truth(model.double(), of_doubles, 3)
    assert all(total_error(of_engine, wanted) <= 1e-4 for of_engine in found)  # rounding, over roots of small moments


@pytest.mark.filterwarnings("ignore:MAML. memory_budget")
def test_activations_computed_again() -> None:
    model, tasks, maml = learner()
    for learn in ((False, False), (True, True)):
        case = Case("decay, rmsprop", learn=learn)
        maml.inner, maml.memory_budget = fm.inner.Groups(case.inner), 1  # byte: nothing fits
        assert maml.explain(tasks, steps=3).recomputes
        found = maml.value_and_grad(tasks, steps=3)[1]
        maml.memory_budget = None
        assert relative_error(found, case.truth(model, tasks, 3)) <= EXACT


@pytest.mark.parametrize("options", [{"clip_norm": 0.3}, {"stop": fm.inner.EarlyStop(loss=1.05)}, {"micro_batches": 2}])
def test_beside_what_else_an_inner_loop_has(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = network(4, 5, 3, activation="tanh")
    tasks = batch_of(4, 3, "cross entropy", (6, 6), tasks=4)
    case = Case("momentum, adam", learned_rates())
    found = [
        fm.MAML(model, F.cross_entropy, inner=case.inner, steps=4, engine=engine, **options).value_and_grad(tasks)[1]
        for engine in ENGINES
    ]
    assert relative_error(*found) <= EXACT


def test_some_parameters_that_adapt_and_another_objective() -> None:
    model, tasks = network_and_tasks()
    gradients = []
    for engine in ENGINES:
        case = Case("momentum, adam", learned_rates())
        inner = {"*.bias": case.inner["0.*"], "*": case.inner["*"]}
        maml = fm.MAML(model, F.cross_entropy, inner=inner, steps=3, parameters=["0.*"], engine=engine)
        out = maml(tasks)
        loss = out.task_losses[1] + out.logits.square().mean()
        wanted = dict(model.named_parameters()) | maml.inner.learned()
        gradients.append(dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True)))
    assert relative_error(*gradients) <= EXACT


def test_rows_of_tables() -> None:
    torch.manual_seed(0)
    model = Words(padding=3).double()
    table = next(n for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    ids = [torch.randint(40, (3, n, LENGTH)) for n in (5, 7)]
    tasks = fm.TaskBatch(*((x, torch.randint(WAYS, x.shape[:2])) for x in ids))
    found = []
    for options in ({"plan": ROWS}, {"plan": "dense"}, {"engine": "autodiff"}):
        case = Case("momentum, adam", learned_rates())
        inner = {f"{table}.*": case.inner["*"], "*": case.inner["0.*"]}
        maml = fm.MAML(model, F.cross_entropy, inner=inner, steps=3, **options)
        if options == {"plan": ROWS}:
            assert [r.plan for r in maml.explain(tasks).rows if r.op == "embedding"] == ["factored"]
        found.append(maml.value_and_grad(tasks)[1])
    assert relative_error(found[0], found[2]) <= EXACT
    assert relative_error(found[1], found[2]) <= EXACT


def test_plain_groups_are_rates_by_name() -> None:
    """On the native executor, to the last bit."""
    model, tasks = network_and_tasks()
    inner = {"*.bias": fm.inner.SGD(0.1), "*": fm.inner.SGD(0.2)}
    lr = {n: 0.1 if n.endswith("bias") else 0.2 for n, _ in model.named_parameters()}
    ours, alone = (fm.MAML(model, F.cross_entropy, **options, steps=3) for options in ({"inner": inner}, {"lr": lr}))
    assert ours.explain(tasks).executor == alone.explain(tasks).executor
    (value, found), (wanted, gradients) = ours.value_and_grad(tasks), alone.value_and_grad(tasks)
    assert torch.equal(value, wanted)
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    ours(tasks).loss.backward()
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    rate = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    ours.inner["*"].lr = rate
    loop = maml_loop(
        model, F.cross_entropy, tasks.support, tasks.query, {n: rate if r == 0.2 else r for n, r in lr.items()}, 3
    )[3]
    wanted = {n: d for n, d in loop.items() if "lr" not in n} | {"inner.*.lr": loop["lr.0.weight"]}
    assert relative_error(ours.value_and_grad(tasks)[1], wanted) <= EXACT
    assert ours.explain(tasks).executor.startswith("native")


def test_what_is_kept_is_what_each_group_needs() -> None:
    _, tasks, maml = learner()
    maml.inner = fm.inner.Groups({"0.*": fm.inner.SGD(0.1, 0.9), "*": fm.inner.AdamW(0.1)})
    assert maml.explain(tasks, steps=2).kept["vectors of the inner rule"] == 3 * 8 * 3 * 18  # g, m, v of the last layer
    maml.inner["0.*"].momentum = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    size = 3 * 8 * (3 * 18 + 25)  # and the buffer of the first
    assert maml.explain(tasks, steps=2).kept["vectors of the inner rule"] == size


def test_changes_of_a_group_are_noticed() -> None:
    model, tasks, maml = learner()
    case = Case("momentum, adam", learn=(False, False))
    groups = maml.inner = fm.inner.Groups(case.inner)

    def check() -> None:
        for _ in range(2):
            assert relative_error(maml.value_and_grad(tasks, steps=3)[1], case.truth(model, tasks, 3)) <= EXACT

    check()
    case.numbers["0.*"] = case.numbers["0.*"] | {"momentum": 0.2}
    groups["0.*"].momentum = 0.2
    check()
    beta = torch.tensor(0.5, dtype=torch.float64)
    case.numbers["*"] = case.numbers["*"] | {"beta1": beta}
    groups["*"].beta1 = beta
    check()
    beta.fill_(0.8)
    check()
    groups["*"].lr = case.lrs["*"] = 0.01
    check()
    case.rules, case.lrs = ({p.replace("0", "2"): v for p, v in d.items()} for d in (case.rules, case.lrs))
    case.numbers = {p.replace("0", "2"): v for p, v in case.numbers.items()}
    maml.inner = fm.inner.Groups({"2.*": groups["0.*"], "*": groups["*"]})
    check()


def test_groups_are_saved_and_loaded() -> None:
    def made() -> fm.MAML:
        rate, beta = (nn.Parameter(torch.tensor(value)) for value in (0.1, 0.9))
        inner = {"bias": fm.inner.SGD(rate), "*": fm.inner.Adam(0.1, (beta, 0.9))}
        return fm.MAML(nn.Linear(2, 2), F.mse_loss, inner=inner)

    maml, other = made(), made()
    assert {n for n in maml.state_dict() if n.startswith("inner")} == {"inner.bias.lr", "inner.*.beta1"}
    with torch.no_grad():
        maml.inner["*"].beta1.fill_(0.5)
    other.load_state_dict(maml.state_dict())
    assert other.inner["*"].beta1 == 0.5


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, tasks = network_and_tasks()
    case = Case("momentum, adam", learned_rates())
    here = case.truth(model, tasks, 3)
    maml = fm.MAML(model.cuda(), F.cross_entropy, inner=case.inner, steps=3)
    for _ in range(3):  # the last one is replayed from a graph
        found = maml.value_and_grad(tasks.to(device="cuda"))[1]
        assert relative_error({n: d.cpu() for n, d in found.items()}, here) <= EXACT


# ---- algorithms


def test_algorithms_take_groups() -> None:
    model, tasks = network_and_tasks()

    def found(kind: Any, **options: Any) -> list[dict[str, Tensor]]:
        case = Case("momentum, adam", learned_rates())
        inner = {"*bias": case.inner["0.*"], "*": case.inner["*"]}
        return [
            kind(model, F.cross_entropy, inner=inner, steps=2, engine=e, **options).value_and_grad(tasks)[1]
            for e in ENGINES
        ]

    for pair in (found(fm.FOMAML), found(fm.ANIL), found(fm.BOIL)):
        assert relative_error(*pair) <= EXACT
    sgd, adam = fm.inner.SGD(0.1, 0.9), fm.inner.Adam(0.05, weight_decay=0.1)
    reptiles = [
        fm.Reptile(model, F.cross_entropy, inner={"0.*": adam, "*": sgd}, engine=e).value_and_grad(tasks)[1]
        for e in ENGINES
    ]
    assert relative_error(*reptiles) <= EXACT
    proto = [
        fm.ProtoMAML(model, F.cross_entropy, inner={"offset_*": sgd, "*": adam}, engine=e).value_and_grad(tasks)[1]
        for e in ENGINES
    ]
    assert relative_error(*proto) <= EXACT
    with pytest.raises(ValueError, match="ProtoMAML: weight_decay must be 0"):
        fm.ProtoMAML(model, F.cross_entropy, inner={"offset_*": adam, "*": sgd})
    with pytest.raises(TypeError, match=r"MAMLPlusPlus: inner must be one rule of fastmeta.inner, .*, got dict"):
        fm.MAMLPlusPlus(model, F.cross_entropy, inner={"*": sgd})


# ---- messages

SGD = fm.inner.SGD(0.1)
WRONG: list[tuple[Any, type[Exception], str]] = [
    ({}, ValueError, "Groups: rules must have an entry for some parameter, got none"),
    ({"*": 0.1}, TypeError, r"Groups: rules\['\*'\] must be a rule of fastmeta.inner, such as SGD, got float"),
    ({"train": SGD}, ValueError, "Groups: names must be free for modules, got 'train'; write it as a pattern"),
    ({0: SGD}, TypeError, "Groups: names must be strings, got int"),
    ({"0.*": SGD}, ValueError, r"a rule for every adapting parameter, got none for \['2.weight', '2.bias'\]; a last"),
    ({"3.*": SGD, "*": SGD}, ValueError, r"MAML: inner must name adapting parameters, got '3.\*'; known: \['0.weight'"),
    (
        {"0.*": SGD, "0.bias": SGD, "*": SGD},
        ValueError,
        r"must leave '0.bias' a parameter, got \['0.\*'\] before it, which have \['0.bias'\]; the first entry that",
    ),
    (
        {"0.*": fm.inner.SGD({"0.weight": 0.1}), "*": SGD},
        ValueError,
        r"MAML: inner\['0.\*'\].lr must have one entry for every adapting parameter, got none for \['0.bias'\]",
    ),
    (
        {"0.*": fm.inner.SGD({"0.weight": torch.rand(2), "0.bias": 0.1}), "*": SGD},
        ValueError,
        r"MAML: inner\['0.\*'\].lr\['0.weight'\] must broadcast to the parameter's shape \(5, 4\), got \(2,\)",
    ),
    ({"*": fm.inner.Groups({"*": SGD})}, TypeError, "must be a rule of fastmeta.inner, such as SGD, got Groups"),
]


@pytest.mark.parametrize(("inner", "kind", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_groups_that_cannot_be(inner: Any, kind: type[Exception], message: str) -> None:
    model, _ = network_and_tasks()
    with pytest.raises(kind, match=message):
        fm.MAML(model, F.cross_entropy, inner=inner)


def test_rules_that_become_wrong_and_rates_given_twice() -> None:
    model, tasks = network_and_tasks()
    with pytest.raises(TypeError, match="Groups: rules must be a mapping from names to rules, got list"):
        fm.inner.Groups([SGD])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"MAML: lr must be None beside inner, got 0.1"):
        fm.MAML(model, F.cross_entropy, lr=0.1, inner={"*": SGD})
    maml = fm.MAML(model, F.cross_entropy, inner={"*": fm.inner.SGD(0.1)})
    maml.inner["*"].momentum = -1.0
    with pytest.raises(ValueError, match=r"SGD: momentum must be finite and not negative, got -1.0"):
        maml.value_and_grad(tasks)

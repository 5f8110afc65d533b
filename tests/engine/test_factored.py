"""Weights that no task forms, on the task-batched executor: the same gradient as weights that are formed."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmeta as fm
from fastmeta.core.low_rank import Factor, LowRank
from tests.engine.test_native import EXACT, batch_of, network, truth
from tests.oracle import relative_error, total_error

pytestmark = pytest.mark.usefixtures("traced_once")
Choice = Callable[[list[str]], set[str]]


def planned(model: nn.Module, choice: Choice) -> dict[str, str]:
    """The linear layers' weights that ``choice`` picks from their names factored, the others dense."""
    weights = sorted(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear))
    chosen = choice(weights)
    return {name: "factored" if name in chosen else "dense" for name in weights}


class Tokens(nn.Module):
    """Layers on a token axis, one of which sees no value that adapts, another one with a reader of its input beside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outside(F.gelu(self.inside(x)))
        return self.head(self.norm(x).mean(-2))


@functools.cache
def tokens() -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    model = Tokens().double()
    sets = ((torch.randn(4, n, 5, 6, dtype=torch.float64), torch.randint(3, (4, n))) for n in (3, 7))
    return model, fm.TaskBatch(*sets)


def plans(maml: fm.MAML, tasks: fm.TaskBatch) -> list[str]:
    return [row.plan for row in maml.explain(tasks).rows if row.op == "linear"]


@functools.cache
def by_autodiff(steps: int, first_order: bool) -> dict[str, Tensor]:
    model, tasks = tokens()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=steps, first_order=first_order, engine="autodiff")
    return maml.value_and_grad(tasks)[1]


@pytest.mark.parametrize("choice", [set, lambda names: set(names[:1]), lambda names: set(names[1:])])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_gradient_is_exact(choice: Choice, first_order: bool, steps: int) -> None:
    model, tasks = tokens()
    options: dict[str, Any] = {"lr": 0.1, "steps": steps, "first_order": first_order}
    plan = planned(model, choice)
    maml = fm.MAML(model, F.cross_entropy, plan=plan, **options)
    assert Counter(plans(maml, tasks)) == Counter(plan.values())
    wanted = by_autodiff(steps, first_order)
    assert relative_error(maml.value_and_grad(tasks)[1], wanted) <= EXACT
    for chunk_size in (1, 3):
        maml.chunk_size = chunk_size
        assert relative_error(maml.value_and_grad(tasks)[1], wanted) <= EXACT


def scalar(model: nn.Module) -> Any:
    return nn.Parameter(torch.tensor(0.1, dtype=torch.float64))


def by_step(model: nn.Module) -> Any:
    return nn.Parameter(torch.tensor([0.1, 0.02, 0.2], dtype=torch.float64))


def by_name(model: nn.Module) -> Any:
    return {n: nn.Parameter(torch.rand((), dtype=torch.float64) * 0.2) for n, _ in model.named_parameters()}


@pytest.mark.parametrize("rates", [scalar, by_step, by_name])
def test_learned_rates_get_their_gradient(rates: Callable[[nn.Module], Any]) -> None:
    model, tasks = tokens()
    lr = rates(model)
    found = fm.MAML(model, F.cross_entropy, lr=lr, steps=3, plan=planned(model, lambda names: set(names[::2])))
    assert "factored" in plans(found, tasks)
    wanted = fm.MAML(model, F.cross_entropy, lr=lr, steps=3, engine="autodiff")
    assert relative_error(found.value_and_grad(tasks)[1], wanted.value_and_grad(tasks)[1]) <= EXACT


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_may_be_left_to_form(learned: bool) -> None:
    model = network(5, 6, 3, activation="tanh", bias=False)
    tasks = batch_of(5, 3, "cross entropy")
    lr = nn.Parameter(torch.tensor(0.1, dtype=torch.float64)) if learned else 0.1
    found = fm.MAML(model, F.cross_entropy, lr=lr, steps=2, plan="factored")
    assert plans(found, tasks) == ["factored", "factored"]
    wanted = fm.MAML(model, F.cross_entropy, lr=lr, steps=2, engine="autodiff")
    assert relative_error(found.value_and_grad(tasks)[1], wanted.value_and_grad(tasks)[1]) <= EXACT


def test_other_objectives_and_parameters_that_do_not_adapt() -> None:
    model, tasks = tokens()
    gradients = []
    for options in ({"plan": "factored"}, {"engine": "autodiff"}):
        maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, parameters=["outside.*", "head.*"], **options)
        out = maml(tasks)
        loss = out.task_losses[1] + out.logits.square().mean()
        found = torch.autograd.grad(loss, model.parameters())
        gradients.append(dict(zip(dict(model.named_parameters()), found, strict=True)))
    assert relative_error(*gradients) <= EXACT


def test_a_rate_an_element_forms_the_weights() -> None:
    model = network(300, 300, 3)
    tasks = batch_of(300, 3, "cross entropy", (2, 2))
    assert "factored" in plans(fm.MAML(model, F.cross_entropy, lr=0.1, executor="reference"), tasks)
    lr = {n: torch.full_like(p, 0.1) for n, p in model.named_parameters()}
    assert "factored" not in plans(fm.MAML(model, F.cross_entropy, lr=lr, executor="reference"), tasks)


@pytest.mark.parametrize("width", [8, 400])
def test_a_plan_can_be_asked_for_against_the_costs(width: int) -> None:
    """Narrow layers choose to be formed and wide ones not to be; either may be told otherwise, by name or all."""
    model = network(width, width, 3, activation="tanh")
    tasks = batch_of(width, 3, "cross entropy", (2, 3))
    chosen = plans(fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="reference"), tasks)[0]
    assert chosen == ("dense" if width == 8 else "factored")
    for plan in ("dense", "factored", {"0.weight": "dense", "2.weight": "factored"}):
        found = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, plan=plan)
        wanted = truth(model, F.cross_entropy, tasks, 0.1, 2)[3]
        assert relative_error(found.value_and_grad(tasks)[1], wanted) <= EXACT
        shown = plans(fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, plan=plan, executor="reference"), tasks)
        assert shown == (list(plan.values()) if isinstance(plan, dict) else [plan, plan])


def test_a_plan_that_cannot_be_is_refused() -> None:
    model = network(4, 6, 3)
    tasks = batch_of(4, 3, "cross entropy")
    for wrong in ("sparse", {"0.weight": "sparse"}, {"nobody": "dense"}):
        with pytest.raises(ValueError, match="plan must"):
            fm.MAML(model, F.cross_entropy, plan=wrong)
    assert plans(fm.MAML(model, F.cross_entropy, plan={"0.*": "factored"}), tasks) == ["factored", "dense"]
    with pytest.raises(ValueError, match=r"got \['\*.bias'\], possible: \['0.weight', '2.weight'\]"):
        fm.MAML(model, F.cross_entropy, plan={"*.bias": "factored"}).value_and_grad(tasks)
    with pytest.raises(RuntimeError, match="asked for"):
        fm.MAML(model, F.cross_entropy, plan="factored", executor="native").value_and_grad(tasks)


class Largest(TorchDispatchMode):
    """The most elements that a call's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(r.numel() for r in (result,) if isinstance(r, Tensor))])
        return result


def test_wide_layers_choose_it_and_form_no_weight_of_a_task() -> None:
    tasks_count, width = 6, 640
    model = network(width, width, width, 5, dtype=torch.float32)
    tasks = batch_of(width, 5, "cross entropy", (3, 4), tasks=tasks_count, dtype=torch.float32)
    maml = fm.MAML(model, F.cross_entropy, lr=0.01, steps=2)
    explanation = maml.explain(tasks)
    assert plans(maml, tasks)[:2] == ["factored", "factored"]
    assert "weights that no task forms" in explanation.executor
    with Largest() as largest:
        found = maml.value_and_grad(tasks)[1]
    assert largest.elements < 2 * width * width
    assert total_error(found, truth(model, F.cross_entropy, tasks, 0.01, 2)[3]) <= 1e-5


NUMBERS = (1.0, torch.tensor(-0.3), torch.tensor(0.6))
ROWS = (torch.rand(7, 1), torch.tensor(0.7), torch.rand(7, 1))
COLUMNS = (torch.rand(1, 5), torch.rand(1, 5), torch.tensor(0.7))


@pytest.mark.parametrize("scales", [NUMBERS, ROWS, COLUMNS], ids=["numbers", "rows", "columns"])
def test_low_rank_matrices(scales: tuple[Any, ...]) -> None:
    shared, x, d = torch.randn(7, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 7)
    coefficient, *others = scales
    pairs = [Factor(torch.randn(3, 2, 7), torch.randn(3, 2, 5), scale) for scale in others]
    one = LowRank(shared, tuple(pairs), coefficient)
    formed = coefficient * shared + sum(scale * torch.bmm(a.mT, b) for a, b, scale in pairs)
    torch.testing.assert_close(one.formed(), formed)
    torch.testing.assert_close(one.times(coefficient).formed(), formed * coefficient)
    torch.testing.assert_close(one.of_rows(x), torch.bmm(x, formed.mT))
    torch.testing.assert_close(one.of_cotangents(d), torch.bmm(d, formed))
    known, new = Factor(torch.randn(3, 2, 7), pairs[1].right, 0.7), Factor(torch.randn(3, 6, 7), torch.randn(3, 6, 5))
    two = LowRank(None, (known, new))
    total = one.plus(two, 0.5)
    assert total.rank == 2 + 2 + 6  # the rows of one factor are known already
    torch.testing.assert_close(total.formed(), formed + 0.5 * two.formed())
    twice = total.plus(one, others[0])
    assert twice.rank <= total.rank + 2  # a product that was there has another scale; folded ones are there no longer
    torch.testing.assert_close(twice.formed(), total.formed() + others[0] * formed)
    torch.testing.assert_close(two.plus(one).formed(), two.formed() + formed)
    for shape in ((), tuple(getattr(coefficient, "shape", ()))):
        found = one.inner(two, shape)
        assert found is not None
        torch.testing.assert_close(found, (formed * two.formed()).sum(0).sum_to_size(shape))
    torch.testing.assert_close(two.over_tasks(), two.formed().sum(0))
    scaled = LowRank(None, one.factors)
    torch.testing.assert_close(scaled.over_tasks(), scaled.formed().sum(0))
    assert LowRank(None).inner(two) is None
    with pytest.raises(RuntimeError, match="neither"):
        LowRank(None).formed()


def test_rows_of_the_data_meet_each_other_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with the shared matrix and of rows of the data do not grow in number with the steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tasks = fm.TaskBatch(*((torch.randn(4, n, 40, dtype=torch.float64), torch.randint(3, (4, n))) for n in (3, 7)))
    counts = Counter[str]()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.bmm.default and args[0].shape[-1] == 40:
                counts["rows"] += 1
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and args[-2].shape[-1] == 40:
                counts["shared"] += 1
            return function(*args, **(kwargs or {}))

    found = []
    for steps in (2, 5):
        maml = fm.MAML(model, F.cross_entropy, 0.1, steps, executor="reference", plan={"0.weight": "factored"})
        maml.value_and_grad(tasks)  # tracing runs the model
        counts.clear()
        with Counting():
            maml.value_and_grad(tasks)
        found.append(dict(counts))
    assert found == [{"rows": 2, "shared": 2}] * 2

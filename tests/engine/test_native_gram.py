"""A layer that reads a task's data and never forms its weight gives the gradient of one that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.core import native as extension
from fastmeta.engine import native
from tests.engine.test_native import ACTIVATIONS, EXACT, batch_of, network, shared, truth
from tests.oracle import relative_error, total_error

pytestmark = [
    pytest.mark.skipif(extension.extension() is None, reason="no extension"),
    pytest.mark.usefixtures("traced_once"),
]


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that can be is in Gram form."""

    def every(support: dict[str, Any], query: dict[str, Any], steps: int, *, second_order: bool) -> tuple[bool, ...]:
        layers = support["operations"]
        return tuple(
            x["operation"] == "linear_block" and x["x"][0][0] and x["w"][0] < support["adapted"] for x in layers
        )

    monkeypatch.setattr(native, "with_gram", every)


def plans(maml: fm.MAML, tasks: fm.TaskBatch) -> list[str]:
    return [row.plan for row in maml.explain(tasks).rows if row.op == "linear"]


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_gradient_is_exact(activation: str, steps: int) -> None:
    model = shared(19, 12, 6, 3, activation=activation)
    tasks = batch_of(19, 3, "cross entropy")
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=steps, executor="native")
    assert plans(maml, tasks) == ["factored", "resident", "resident"]
    right = truth(model, F.cross_entropy, tasks, 0.1, steps)[3]
    for _ in range(2):  # a workspace that is used again
        assert relative_error(maml.value_and_grad(tasks)[1], right) <= EXACT


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("features", "width", "sizes"), [(1, 9, (3, 5)), (33, 70, (7, 2)), (18, 16, (1, 1))])
def test_other_shapes_steps_of_their_own_and_first_order(
    first_order: bool, features: int, width: int, sizes: tuple[int, int]
) -> None:
    model = shared(features, width, 2, activation="gelu", bias=features != 33)
    tasks = batch_of(features, 2, "mse", sizes)
    options: dict[str, Any] = {"lr": torch.tensor([0.1, 0.03, 0.2], dtype=torch.float64), "steps": 3}
    options["first_order"] = first_order
    found = fm.MAML(model, F.mse_loss, executor="native", **options)
    assert plans(found, tasks)[0] == "factored"
    wanted = fm.MAML(model, F.mse_loss, executor="reference", **options)
    assert relative_error(found.value_and_grad(tasks)[1], wanted.value_and_grad(tasks)[1]) <= EXACT
    loss = found(tasks).task_losses[1]  # another objective than the mean
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    wanted(tasks).task_losses[1].backward()
    assert relative_error(gradients, {n: p.grad for n, p in model.named_parameters()}) <= EXACT
    model.zero_grad()


@pytest.mark.usefixtures("forced")
def test_the_same_bits_with_any_number_of_threads(set_threads: Callable[[int], None]) -> None:
    model = network(40, 24, 3, dtype=torch.float32)
    tasks = batch_of(40, 3, "cross entropy", tasks=9, dtype=torch.float32)
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor="native")
    results = []
    for threads in (1, 2, 4):
        set_threads(threads)
        results.append(maml.value_and_grad(tasks)[1])
    for other in results[1:]:
        assert all(torch.equal(g, results[0][n]) for n, g in other.items())


def learned(model: nn.Module) -> fm.MAML:
    return fm.MAML(model, F.cross_entropy, lr=nn.Parameter(torch.tensor(0.1, dtype=torch.float64)), executor="native")


def by_name(model: nn.Module) -> fm.MAML:
    rates = {name: 0.1 for name, _ in model.named_parameters()}
    return fm.MAML(model, F.cross_entropy, lr=rates, executor="native")


def frozen(model: nn.Module) -> fm.MAML:
    return fm.MAML(model, F.cross_entropy, lr=0.1, parameters=["2.*"], executor="native")


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("make", [learned, by_name, frozen])
def test_rates_of_their_own_and_layers_that_do_not_adapt_form_their_weights(make: Callable[..., fm.MAML]) -> None:
    model = shared(19, 12, 3)
    tasks = batch_of(19, 3, "cross entropy")
    maml = make(model)
    assert "factored" not in plans(maml, tasks)
    reference = make(model)
    reference.executor = "reference"
    assert relative_error(maml.value_and_grad(tasks)[1], reference.value_and_grad(tasks)[1]) <= EXACT


def test_wide_inputs_choose_it_and_take_less_memory() -> None:
    model = network(784, 64, 5, dtype=torch.float32)
    tasks = batch_of(784, 5, "cross entropy", (25, 25), dtype=torch.float32)
    maml = fm.MAML(model, F.cross_entropy, lr=0.01, steps=5, executor="native")
    assert plans(maml, tasks) == ["factored", "resident"]
    assert "formed for no task" in str(maml.explain(tasks))
    assert total_error(maml.value_and_grad(tasks)[1], truth(model, F.cross_entropy, tasks, 0.01, 5)[3]) <= 1e-5
    rates = {name: 0.01 for name, _ in model.named_parameters()}
    formed = fm.MAML(model, F.cross_entropy, lr=rates, steps=5, executor="native")
    assert plans(formed, tasks) == ["resident", "resident"]
    assert 3 * maml.explain(tasks).kept["fast weights"] < formed.explain(tasks).kept["fast weights"]


def test_narrow_inputs_do_not() -> None:
    tasks = batch_of(1, 1, "mse", (10, 10))
    for steps in (1, 5):
        maml = fm.MAML(network(1, 40, 40, 1), F.mse_loss, lr=0.01, steps=steps, executor="native")
        assert "factored" not in plans(maml, tasks)


def test_the_extension_refuses_rates_that_it_could_not_apply(forced: None) -> None:
    model = network(19, 12, 3)
    tasks = batch_of(19, 3, "cross entropy")
    maml = fm.MAML(model, F.cross_entropy, lr=nn.Parameter(torch.tensor(0.1, dtype=torch.float64)), executor="native")
    step = maml.prepare(tasks)[1].native
    step._dense = lambda: (True, False, False)
    with pytest.raises(ValueError, match="collected weight"):
        maml.value_and_grad(tasks)

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
from tests.oracle import maml_loop, relative_error, total_error

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
    cases = [(fixed, 0.03, 3, False), (learned, rate, 3, False), (fixed, 0.03, 2, True), (learned, rate, 3, True)]
    for numbers, lr, steps, maml.first_order in [*cases, (learned, rate, 1, False), (learned, rate, 0, False)]:
        maml.inner = configured(name, lr, numbers)
        wanted = truth(model, tasks, lr, steps, maml.first_order, name, numbers)
        for maml.chunk_size in (None, 2):
            assert relative_error(maml.value_and_grad(tasks, steps=steps)[1], wanted) <= EXACT
    maml.first_order, maml.chunk_size = False, None


@pytest.mark.parametrize("name", ["rmsprop, all", "adagrad, all", "adam, amsgrad", "adamw"])
def test_rates_of_any_shape(name: str) -> None:
    """One rate a parameter, a row, a column, an element, alone learned and beside the other numbers."""
    model, tasks, maml = learner()
    for kinds in ({"0.weight": "row", "2.weight": "column"}, {"0.weight": "element"}, {}):
        for others, numbers in (("one", RULES[name][1]), ("element", tensors(RULES[name][1]))):
            lr = rates_of(model, kinds, others)
            maml.inner = configured(name, lr, numbers)
            found = maml.value_and_grad(tasks, steps=2)[1]
            assert relative_error(found, truth(model, tasks, lr, 2, False, name, numbers)) <= EXACT

"""A meta-step seen before is recognised, and whatever has changed meanwhile is noticed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.algorithms.recall import MOST, Recall
from fastmeta.core import native
from tests.oracle import maml_loop, relative_error

T, EXACT = 3, 1e-9

recalls = pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}")


def sets():
    def one(n: int):
        return torch.randn(T, n, 4, dtype=torch.float64), torch.randint(3, (T, n))

    return one(5), one(6)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def check(maml: fm.MAML, model: nn.Module, support, query) -> dict[str, torch.Tensor]:
    _, gradients = maml.value_and_grad(fm.TaskBatch(support, query))
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    truth = maml_loop(model, F.cross_entropy, support, query, 0.1, maml.steps, adapted_names=named)[3]
    assert relative_error({n: gradients[n] for n in named}, {n: truth[n] for n in named}) <= EXACT
    return gradients


def swap_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 3).double()


def swap_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))


def swap_data(model: nn.Sequential) -> None:
    model[0].weight.data = torch.randn(6, 4, dtype=torch.float64)


def turn_data(model: nn.Sequential) -> None:
    """Rows that do not lie one behind the other."""
    model[0].weight.data = torch.randn(4, 6, dtype=torch.float64).t()


def widen(model: nn.Sequential) -> None:
    model[0].weight.data, model[0].bias.data = torch.randn(9, 4).double(), torch.randn(9).double()
    model[2].weight.data = torch.randn(3, 9).double()


def freeze(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_(False)


def drop_bias(model: nn.Sequential) -> None:
    model[2].bias = None


def append(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3).double())


def write_in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


CHANGES = [swap_layer, swap_parameter, swap_data, turn_data, widen, freeze, drop_bias, append, write_in_place]


class Derived(torch.Tensor):
    """Of a type whose tensors are asked for everything by name, as all are in a PyTorch without DLPack 1.3."""


def derived(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_subclass(Derived)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.mark.parametrize("type_of", [plain, derived])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_of_the_model_are_noticed(change: Callable[[nn.Sequential], None], type_of: Callable) -> None:
    torch.manual_seed(0)
    model, (support, query) = small(), sets()
    for layer in (model[0], model[2]):
        layer.weight, layer.bias = nn.Parameter(type_of(layer.weight)), nn.Parameter(type_of(layer.bias))
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    for _ in range(2):
        check(maml, model, support, query)
    change(model)
    for _ in range(2):
        check(maml, model, support, query)


@pytest.mark.parametrize("first", ["scalar", "table"])
def test_another_kind_of_rate_is_noticed(first: str) -> None:
    torch.manual_seed(0)
    model, (support, query) = small(), sets()
    table = {name: 0.05 * (i + 1) for i, (name, _) in enumerate(model.named_parameters())}
    rates = {"scalar": torch.tensor(0.1, dtype=torch.float64), "table": fm.MAML(model, F.cross_entropy, lr=table).lr}
    truth = {
        kind: fm.MAML(model, F.cross_entropy, lr=lr, steps=2, engine="autodiff").value_and_grad(
            fm.TaskBatch(support, query)
        )[1]
        for kind, lr in {"scalar": 0.1, "table": table}.items()
    }
    maml = fm.MAML(model, F.cross_entropy, lr=table, steps=2)
    for kind in (first, *(k for k in rates if k != first)) * 2:
        del maml.lr  # a module is not replaced by a tensor
        maml.lr = rates[kind]
        for _ in range(2):
            gradients = maml.value_and_grad(fm.TaskBatch(support, query))[1]
            assert relative_error(gradients, truth[kind]) <= EXACT


@pytest.mark.parametrize("type_of", [plain, derived])
def test_tasks_of_another_kind_are_noticed(type_of: Callable) -> None:
    torch.manual_seed(0)
    model, (support, query) = small(), sets()
    support, query = [tuple(type_of(x) for x in s) for s in (support, query)]
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    check(maml, model, support, query)
    check(maml, model, tuple(x[:2] for x in support), tuple(x[:2] for x in query))
    # tasks that do not lie one behind the other, samples that do not, the same numbers in other places
    spread = tuple(torch.stack([x, x], 1)[:, 0] for x in support)
    turned = support[0].transpose(1, 2).contiguous().transpose(1, 2), support[1]
    for other in (spread, turned):
        check(maml, model, other, query)
    with pytest.raises(TypeError, match="dtype"):
        maml.value_and_grad(fm.TaskBatch((support[0].float(), support[1]), query))
    with pytest.raises(ValueError, match="require grad"):
        maml.value_and_grad(fm.TaskBatch((support[0].clone().requires_grad_(), support[1]), query))


def test_gradients_of_an_earlier_meta_step_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model, (support, query) = small(), sets()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    first = check(maml, model, support, query)
    copies = {name: g.clone() for name, g in first.items()}
    write_in_place(model)
    check(maml, model, support, query)
    assert all(torch.equal(first[name], copies[name]) for name in first)


def test_a_model_that_holds_its_learner_is_collected() -> None:
    model, (support, query) = small(), sets()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=1)
    maml.value_and_grad(fm.TaskBatch(support, query))
    model.learner = [maml]  # not a submodule, which would contain itself
    gone = weakref.ref(model)
    del model, maml
    gc.collect()
    assert gone() is None


@recalls
def test_the_same_kind_of_meta_step_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, (support, query) = small(), sets()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    check(maml, model, support, query)

    def prepared_again(work: object) -> None:
        raise AssertionError("prepared again")

    monkeypatch.setattr(maml._memory.compiler, "compile", prepared_again)
    write_in_place(model)
    check(maml, model, *sets())
    swap_layer(model)
    with pytest.raises(AssertionError, match="prepared again"):
        maml.value_and_grad(fm.TaskBatch(support, query))


@recalls
def test_only_the_last_few_kinds_are_remembered() -> None:
    model, (support, query) = small(), sets()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=1)
    for steps in range(1, MOST + 4):
        maml.value_and_grad(fm.TaskBatch(support, query), steps=steps)
    assert len(maml._memory.recall._entries) == MOST


def test_without_the_extension_every_meta_step_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", lambda: None)
    recall = Recall(small())
    recall.keep("settings", (torch.zeros(1),), None, None)  # type: ignore[arg-type]
    assert recall.find("settings", (torch.zeros(1),)) is None

"""Bad input is named, with what was expected and the mend; it never becomes a wrong number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm


def sets(dtype=torch.float32, tasks: int = 3):
    return tuple((torch.randn(tasks, n, 4, dtype=dtype), torch.randint(3, (tasks, n))) for n in (5, 6))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def maml(**settings) -> fm.MAML:
    return fm.MAML(model(), F.cross_entropy, **settings)


BATCHES = {
    "no tasks": (lambda s, q: (tuple(x[:0] for x in s), q), "at least one task"),
    "empty support": (lambda s, q: (tuple(x[:, :0] for x in s), q), "support must hold at least one sample"),
    "empty query": (lambda s, q: (s, tuple(x[:, :0] for x in q)), "query must hold at least one sample"),
    "nothing": (lambda s, q: ({}, q), "at least one tensor"),
    "unequal": (lambda s, q: ((s[0], s[1][:2]), q), r"\[3, 2\].*TaskBatch.stack"),
    "unequal query": (lambda s, q: (s, tuple(x[:2] for x in q)), "leading task axis 3"),
    "a number": (lambda s, q: ((s[0], torch.tensor(1)), q), "task axis first"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_none(name) -> None:
    change, message = BATCHES[name]
    with pytest.raises(ValueError, match=message):
        fm.TaskBatch(*change(*sets()))


def test_leaves_must_be_tensors() -> None:
    with pytest.raises(TypeError, match="every leaf of support must be a tensor, got ndarray"):
        fm.TaskBatch((np.zeros((3, 5, 4)), torch.zeros(3, 5)))


@pytest.mark.parametrize("engine", ["program", "autodiff"])
@pytest.mark.parametrize("bad", [3, -1])
def test_labels_out_of_range(engine, bad) -> None:
    (xs, ys), query = sets()
    ys[1, 2] = bad
    with pytest.raises((ValueError, IndexError), match=rf"{bad}"):
        maml(engine=engine)(fm.TaskBatch((xs, ys), query))


def test_a_batch_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"torch.float32, got torch.float64; use tasks.to\(dtype"):
        maml()(fm.TaskBatch(*sets(torch.float64)))
    assert maml()(fm.TaskBatch(*sets(torch.float64)).to(dtype=torch.float32)).loss.dtype == torch.float32


def test_a_batch_on_another_device() -> None:
    support, query = sets()
    with pytest.raises(ValueError, match=r"model's device cpu, got meta; use tasks.to"):
        maml()(fm.TaskBatch(support, query).to("meta"))
    with pytest.raises(ValueError, match="on one device"):
        fm.TaskBatch((support[0], support[1].to("meta")), query)


def test_what_is_not_finite_is_named_by_task_and_step() -> None:
    (xs, ys), query = sets()
    xs[2, 1, 0] = torch.nan
    with pytest.raises(ValueError, match=r"values of support.*task 2"):
        maml(check_finite=True)(fm.TaskBatch((xs, ys), query))
    assert torch.isnan(maml()(fm.TaskBatch((xs, ys), query)).loss)

    def explodes(outputs, targets):
        return F.cross_entropy(outputs, targets) + torch.where(outputs.abs().max() > 1e3, torch.inf, 0.0)

    for engine in ("program", "autodiff"):
        with pytest.raises(ValueError, match=r"support loss at inner step [12] must be finite, got inf for task"):
            fm.MAML(model(), explodes, lr=1e5, steps=3, check_finite=True, engine=engine)(fm.TaskBatch(*sets()))


@pytest.mark.parametrize("engine", ["program", "autodiff", "auto"])
def test_a_loss_that_is_not_a_scalar(engine) -> None:
    broken = fm.MAML(model(), lambda o, t: F.cross_entropy(o, t, reduction="none"), engine=engine)
    with pytest.raises(ValueError, match=r"scalar for one task, got shape \(5,\); reduce it with a mean"):
        broken(fm.TaskBatch(*sets()))
    with pytest.raises(TypeError, match="loss must return a tensor, got float"):
        fm.MAML(model(), lambda o, t: 1.0, engine=engine)(fm.TaskBatch(*sets()))


SETTINGS = [
    ({"steps": -1}, ValueError, "steps must not be negative, got -1"),
    ({"steps": 1.5}, TypeError, "steps must be an int, got float"),
    ({"engine": "magic"}, ValueError, "got 'magic'"),
    ({"lr": "fast"}, TypeError, "lr must be a number or a tensor, got str"),
    ({"lr": torch.tensor(1)}, TypeError, "floating-point tensor, got torch.int64"),
    ({"lr": torch.rand(2, 2)}, ValueError, r"shape \[\] or \[steps\]"),
    ({"lr": {"0.weight": 0.1}}, ValueError, r"got none for \['0.bias'"),
    ({"lr": dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias", "x"], 0.1)}, ValueError, r"unknown \['x'\]"),
    ({"lr": {n: torch.rand(7) for n in ("0.weight", "0.bias", "2.weight", "2.bias")}}, ValueError, "broadcast"),
    ({"parameters": []}, ValueError, "at least one parameter must adapt"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), SETTINGS, ids=lambda v: str(v)[:40])
def test_settings_that_cannot_be(settings, kind, message) -> None:
    with pytest.raises(kind, match=message):
        maml(**settings)


def test_too_few_rates_for_the_steps() -> None:
    adapting = maml(lr=torch.tensor([0.1, 0.2]), steps=3)
    adapting(fm.TaskBatch(*sets()), steps=2)
    with pytest.raises(ValueError, match="at least 3 rates for 3 steps, got 2"):
        adapting(fm.TaskBatch(*sets()))
    with pytest.raises(ValueError, match="at least 1 rates for 1 steps, got 0"):
        maml(lr=torch.empty(0), steps=0)(fm.TaskBatch(*sets()), steps=1)


def test_models_and_tasks_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, got function"):
        fm.MAML(lambda x: x, F.cross_entropy)
    with pytest.raises(TypeError, match="loss must be callable, got int"):
        fm.MAML(model(), 3)
    with pytest.raises(TypeError, match="TaskBatch, got tuple"):
        maml()(sets())
    with pytest.raises(ValueError, match="query set, got None"):
        maml()(fm.TaskBatch(sets()[0]))


def test_tasks_that_want_a_gradient_of_their_own() -> None:
    (xs, ys), query = sets()
    with pytest.raises(ValueError, match="engine='autodiff'"):
        maml(engine="program")(fm.TaskBatch((xs.requires_grad_(), ys), query))
    maml(engine="autodiff", lr=0.1)(fm.TaskBatch((xs, ys), query)).loss.backward()
    assert xs.grad.abs().max() > 0


def test_stacking_tasks_that_do_not_fit() -> None:
    def task(n, width=4):
        return (torch.randn(n, width), torch.randint(3, (n,)))

    with pytest.raises(ValueError, match="at least one task"):
        fm.TaskBatch.stack([])
    with pytest.raises(ValueError, match="number of samples only"):
        fm.TaskBatch.stack([(task(5), task(5)), (task(4, 3), task(5))])
    with pytest.raises(ValueError, match="same structure"):
        fm.TaskBatch.stack([(task(5), task(5)), (task(5)[0], task(5))])
    with pytest.raises(ValueError, match=r"pair so that weights can mask"):
        fm.TaskBatch.stack([({"x": torch.zeros(2)}, task(1)), ({"x": torch.zeros(3)}, task(1))])

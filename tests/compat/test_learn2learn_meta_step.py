"""The bridge: one call of the engine for what the loop over tasks computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta.compat.learn2learn as l2l
from fastmeta.compat.learn2learn.algorithms import engine
from fastmeta.tasks.batch import TaskBatch
from tests.compat.learn2learn_cases import Task, assert_equal, loop, made, mlp


def with_maml(model: nn.Module, first_order: bool) -> nn.Module:
    return l2l.algorithms.MAML(model, lr=0.3, first_order=first_order)


def with_a_learned_rate(model: nn.Module, first_order: bool) -> nn.Module:
    rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    return l2l.algorithms.MAML(model, lr=rate, first_order=first_order)


def with_meta_sgd(model: nn.Module, first_order: bool) -> nn.Module:
    meta = l2l.algorithms.MetaSGD(model, lr=0.3, first_order=first_order)
    with torch.no_grad():
        for lr in meta.lrs:
            lr.add_(0.1 * torch.randn_like(lr))
    return meta


def both(learner: nn.Module, tasks: list[Task], steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Loss, gradients and buffers of the loop and of the engine, from the same start."""
    learner.zero_grad()
    twin = copy.deepcopy(learner)
    value = loop(twin, tasks, steps)
    value.backward()
    out = learner.meta_step(tasks, F.cross_entropy, steps=steps)
    out.loss.backward()
    results = []
    for loss, module in ((value, twin), (out.loss, learner)):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
        results.append([loss.detach(), *grads, *(b.double() for b in module.buffers())])
    return results[0], results[1]


@pytest.mark.parametrize(
    ("name", "make", "first_order"),
    [
        ("mlp", with_maml, False),
        ("mlp", with_a_learned_rate, False),
        ("mlp", with_meta_sgd, True),
        ("conv", with_maml, True),
        ("conv", with_meta_sgd, False),
        ("tied", with_a_learned_rate, True),
        ("tied", with_meta_sgd, False),
        ("lstm", with_maml, False),
    ],
)
def test_the_engine_gives_what_the_loop_gives(name: str, make: Callable, first_order: bool) -> None:
    model, tasks = made(name)
    of_loop, of_engine = both(make(model, first_order), tasks, 2)
    assert_equal(of_engine, of_loop, 1e-10)  # running statistics and their counts among them


class Attentive(nn.Module):
    """Attention over a sequence, and an answer from its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def test_attention_needs_no_choice_of_kernels() -> None:
    _, tasks = made("lstm")
    maml = l2l.algorithms.MAML(Attentive().double(), lr=0.1)
    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.grad(loop(maml, tasks, 1), list(maml.parameters()))
    maml.meta_step(tasks, F.cross_entropy, 1).loss.backward()
    assert_equal([p.grad for p in maml.parameters()], truth, 1e-10)


def test_running_statistics_can_be_left_alone() -> None:
    model, tasks = made("conv")
    maml, before = l2l.algorithms.MAML(model, lr=0.3), model[1].running_mean.clone()
    maml.meta_step(tasks, F.cross_entropy, 1, update_running_stats=False)
    assert torch.equal(model[1].running_mean, before)
    maml.meta_step(tasks, F.cross_entropy, 1)
    assert not torch.equal(model[1].running_mean, before)


def test_settings_may_change_between_meta_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    count = []

    class Counted(engine.MAML):
        def __init__(self, *args, **kwargs):
            count.append(kwargs)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(engine, "MAML", Counted)
    model, tasks = made("mlp")
    maml = l2l.algorithms.MAML(model, lr=0.3)
    stacked = TaskBatch.stack(tasks)
    for change in ({}, {"lr": 0.1}, {"first_order": True}, {"first_order": False}):
        for name, value in change.items():
            setattr(maml, name, value)
        for steps in (1, 2):
            maml.zero_grad()
            out = maml.meta_step(stacked, F.cross_entropy, steps)
            out.loss.backward()
            truth = loop(maml, tasks, steps)
            given = [p.grad for p in model.parameters()]
            assert_equal(given, torch.autograd.grad(truth, list(model.parameters())), 1e-10)
            assert out.support_losses.shape == (steps, 3)
    assert len(count) == 1
    maml.lr = torch.tensor(0.2, dtype=torch.float64)
    maml.meta_step(stacked, F.cross_entropy, 1)
    maml.meta_step(stacked, F.cross_entropy, 1, chunk_size=2)
    assert [c.get("chunk_size") for c in count] == [None, None, 2]
    with pytest.raises(TypeError, match="no_such_option"):
        maml.meta_step(stacked, F.cross_entropy, 1, no_such_option=True)


def test_frozen_and_unused_parameters() -> None:
    model, tasks = made("mlp")
    model[2].weight.requires_grad_(False)
    refused = l2l.algorithms.MAML(model, lr=0.3)
    with pytest.raises(RuntimeError, match=r"MAML.meta_step: parameters must be .* 2.weight; pass allow_nograd=True"):
        refused.meta_step(tasks, F.cross_entropy)
    of_loop, of_engine = both(l2l.algorithms.MAML(model, lr=0.3, allow_nograd=True), tasks, 2)
    assert_equal(of_engine, of_loop, 1e-10)

    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    of_loop, of_engine = both(l2l.algorithms.MAML(model, lr=0.3, allow_nograd=True), tasks, 2)
    assert_equal(of_engine, of_loop, 1e-10)
    with pytest.raises(ValueError, match="idle"):
        l2l.algorithms.MAML(model, lr=0.3, allow_unused=False, allow_nograd=True).meta_step(tasks, F.cross_entropy)
    with pytest.raises(RuntimeError, match=r"MetaSGD.meta_step: parameters must be .* 2.weight"):
        l2l.algorithms.MetaSGD(model, lr=0.3).meta_step(tasks, F.cross_entropy)
    short = l2l.algorithms.MetaSGD(model, lrs=[torch.ones(())])
    with pytest.raises(ValueError, match=r"MetaSGD.meta_step: lrs must be one for each .* 7 parameters, got 1"):
        short.meta_step(tasks, F.cross_entropy)


def test_a_clone_is_refused() -> None:
    model, tasks = made("mlp")
    for learner in (l2l.algorithms.MAML(model, lr=0.3), l2l.algorithms.MetaSGD(model, lr=0.3)):
        with pytest.raises(
            ValueError, match=r"meta_step: parameters must be leaves .* call it on the learner that was"
        ):
            learner.clone().meta_step(tasks, F.cross_entropy)


def test_the_learner_stays_what_it_was() -> None:
    model, tasks = made("mlp")
    maml = l2l.algorithms.MAML(model, lr=0.3)
    names = list(maml.state_dict())
    maml.meta_step(tasks, F.cross_entropy)
    assert list(maml.state_dict()) == names
    assert [n for n, _ in maml.named_parameters()] == names
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        other.meta_step(tasks, F.cross_entropy).loss.backward()
        assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in maml.parameters())


def test_tasks_of_unequal_size_are_padded() -> None:
    sizes = [(4, 3), (6, 5)]
    tasks = [tuple((torch.randn(n, 5).double(), torch.randint(3, (n,))) for n in task) for task in sizes]
    of_loop, of_engine = both(l2l.algorithms.MAML(mlp().double(), lr=0.3), tasks, 2)
    assert_equal(of_engine, of_loop, 1e-10)

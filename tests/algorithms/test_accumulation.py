"""Gradients that are added up: over parts of the support set before an inner step, over calls before an outer one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from fastmeta.core.live_bytes import LiveBytes
from tests.algorithms.problems import EXACT, WAYS, T, labelled, network
from tests.oracle import relative_error

LR, STEPS = 0.3, 3


def learned(kind: str, model: nn.Module, **settings: Any) -> fm.MAML:
    if kind == "momentum":
        rate = nn.Parameter(torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64))
        settings["inner"] = fm.inner.SGD(rate, momentum=0.5, weight_decay=0.01)
        return fm.MAML(model, F.cross_entropy, steps=STEPS, clip_norm=0.3, **settings)
    if kind == "adam":
        return fm.MAML(model, F.cross_entropy, inner=fm.inner.Adam(0.05), steps=STEPS, **settings)
    made: Any = getattr(fm, kind)
    return made(model, F.cross_entropy, LR, STEPS, **settings)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["momentum", "adam", "ANIL", "FOMAML", "MetaCurvature", "IMAML", "MAMLPlusPlus"])
def test_parts_of_the_support_set_give_what_the_whole_gives(kind: str) -> None:
    model, tasks = network(), labelled(shots=4)
    whole, parts = learned(kind, model), learned(kind, model, micro_batches=3)
    loss, wanted = whole.value_and_grad(tasks)
    engines = ("program",) if kind == "IMAML" else ("program", "autodiff") if kind == "momentum" else ("auto",)
    for parts.engine in engines:
        found_loss, found = parts.value_and_grad(tasks)
        assert relative_error(found_loss, loss) <= EXACT
        assert relative_error(found, wanted) <= EXACT
        assert relative_error(parts(tasks).support_losses, whole(tasks).support_losses) <= EXACT
        theirs, ours = whole.adapt(tasks).parameters, parts.adapt(tasks).parameters
        assert relative_error(ours, theirs) <= EXACT
    if kind == "momentum":
        parts.engine, parts.chunk_size, parts.memory_budget = "auto", 2, 1
        with warnings.catch_warnings(action="ignore"):  # that it is too small
            assert relative_error(parts.value_and_grad(tasks)[1], wanted) <= EXACT


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, WAYS)).double()


def test_batch_norm_normalises_each_part_and_follows_all_of_them() -> None:
    model, tasks = normed(), labelled(shots=4)
    truth = normed()
    theta = dict(truth.named_parameters())
    losses = []
    for t in range(T):
        (xs, ys), (xq, yq) = tasks.task(t)
        phi = dict(theta)
        buffers = dict(truth.named_buffers())  # which every pass updates in place
        for _ in range(STEPS):
            both = zip(xs.split(6), ys.split(6), strict=True)
            inner = sum(F.cross_entropy(functional_call(truth, {**phi, **buffers}, (x,)), y) for x, y in both) / 2
            g = torch.autograd.grad(inner, list(phi.values()), create_graph=True)
            phi = {n: p - LR * d for (n, p), d in zip(phi.items(), g, strict=True)}
        losses.append(F.cross_entropy(functional_call(truth, {**phi, **buffers}, (xq,)), yq))
    wanted = dict(zip(theta, torch.autograd.grad(torch.stack(losses).mean(), list(theta.values())), strict=True))
    for engine in ("program", "autodiff"):
        model = normed()
        learner = fm.MAML(
            model, F.cross_entropy, LR, STEPS, micro_batches=2, batch_norm="followed", engine=engine, chunk_size=2
        )
        assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
        for name, buffer in truth.named_buffers():
            assert relative_error(dict(model.named_buffers())[name].double(), buffer.double()) <= EXACT, name


def test_only_one_part_is_held_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), *[nn.Tanh(), nn.Linear(32, 32)] * 2, nn.Tanh(), nn.Linear(32, WAYS))
    x, y = torch.randn(1, 240, 4), torch.randint(0, WAYS, (1, 240))
    tasks = fm.TaskBatch((x, y), (x[:, :6].contiguous(), y[:, :6].contiguous()))
    peaks = []
    for count in (1, 6):
        learner = fm.MAML(model, F.cross_entropy, LR, 4, micro_batches=count, executor="reference", plan="dense")
        learner.value_and_grad(tasks)
        with LiveBytes() as live:
            learner.value_and_grad(tasks)
        peaks.append(live.peak)
        table = learner.explain(tasks)
        assert table.recomputes == (count == 6)
        assert table.peak >= live.peak
    assert peaks[1] < peaks[0] / 4
    assert "because support sets are cut into micro-batches" in table.executor


def test_calls_add_up_to_one_on_all_their_tasks() -> None:
    tasks = fm.TaskBatch(*[
        tuple(torch.cat(leaves) for leaves in zip(*sets, strict=True))
        for sets in zip(*[(b.support, b.query) for b in (labelled(seed) for seed in (1, 2))], strict=True)
    ])  # fmt: skip
    rate = nn.Parameter(torch.tensor(LR, dtype=torch.float64))
    found: list[dict[str, Tensor]] = []
    for parts in ([tasks], [labelled(1), labelled(2)]):
        learner = fm.MAML(normed(), F.cross_entropy, rate, STEPS, batch_norm="followed")
        learner.zero_grad()
        for part in parts:
            (learner(part).loss / len(parts)).backward()
        found.append({n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None})
        found[-1] |= {n: b.double() for n, b in learner.named_buffers()}
    assert "lr" in found[0]
    assert relative_error(found[1], found[0]) <= EXACT


def test_what_does_not_fit_is_refused() -> None:
    model, tasks = network(), labelled()
    for wrong, kind in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(kind, match="MAML: micro_batches must be"):
            fm.MAML(model, F.cross_entropy, micro_batches=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MAML: micro_batches must divide the support samples, got 4 for 6"):
        fm.MAML(model, F.cross_entropy, micro_batches=4)(tasks)
    with pytest.raises(ValueError, match="MAML: plan must not be 'factored' with micro_batches"):
        fm.MAML(model, F.cross_entropy, micro_batches=2, plan="factored")
    with pytest.raises(TypeError, match="ProtoMAML: micro_batches must be left out"):
        fm.ProtoMAML(model, F.cross_entropy, micro_batches=2)
    weights = torch.ones(T, 6, dtype=torch.float64)
    weighted = fm.TaskBatch((*tasks.support, weights), tasks.query)
    with pytest.raises(ValueError, match="MAML: micro_batches must be 1 for support sets with weights"):
        fm.MAML(model, F.cross_entropy, micro_batches=2)(weighted)
    uneven = fm.TaskBatch((tasks.support[0], tasks.support[1].repeat(1, 2)), tasks.query)
    with pytest.raises(ValueError, match=r"MAML: micro_batches needs support tensors \[T, N, ...\] of one N"):
        fm.MAML(model, lambda m, b: F.cross_entropy(m(b[0]), b[1][:, :6]), micro_batches=2)(uneven)

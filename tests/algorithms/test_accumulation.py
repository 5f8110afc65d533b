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


def test_parts_of_the_support_set_give_what_the_whole_gives() -> None:
    model, tasks = network(), labelled(shots=4)
    rate = nn.Parameter(torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64))
    learner = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(rate, momentum=0.5, weight_decay=0.01), steps=STEPS)
    learner.clip_norm = 0.3
    compare(learner, tasks)
    learner.engine = "autodiff"
    compare(learner, tasks)
    learner.engine, learner.chunk_size, learner.memory_budget = "auto", 2, 1
    with warnings.catch_warnings(action="ignore"):  # that it is too small
        compare(learner, tasks)
    learner.clip_norm, learner.memory_budget, learner.inner = None, None, fm.inner.Adam(0.05)
    compare(learner, tasks)
    learner.first_order = True
    compare(learner, tasks)


@pytest.mark.parametrize("kind", [fm.ANIL, fm.IMAML])
def test_other_algorithms(kind: Any) -> None:
    compare(kind(network(), F.cross_entropy, LR, STEPS), labelled(shots=4))


def compare(learner: fm.MAML, tasks: fm.TaskBatch) -> None:
    """The meta-step and the adaptation on three parts of the support set with those on the whole."""
    learner.micro_batches = 1
    loss, wanted = learner.value_and_grad(tasks)
    theirs = learner.adapt(tasks)
    learner.micro_batches = 3
    found_loss, found = learner.value_and_grad(tasks)
    assert relative_error(found_loss, loss) <= EXACT
    assert relative_error(found, wanted) <= EXACT
    ours = learner.adapt(tasks)
    assert relative_error(ours.support_losses, theirs.support_losses) <= EXACT
    assert relative_error(ours.parameters, theirs.parameters) <= EXACT


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


def test_rows_of_batch_norm_by_either_engine() -> None:
    tasks, results = labelled(shots=4), []
    for engine in ("program", "autodiff"):
        learner = fm.MAMLPlusPlus(normed(), F.cross_entropy, LR, STEPS, micro_batches=2, engine=engine)
        found = learner.value_and_grad(tasks)[1]
        rows = learner.norms.tensors(statistics=True) if learner.norms else {}
        results.append(found | {n: b.double() for n, b in rows.items()})
    assert "1.running_mean" in results[0]
    assert relative_error(results[0], results[1]) <= EXACT


def test_only_one_part_is_held_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), *[nn.Tanh(), nn.Linear(32, 32)], nn.Tanh(), nn.Linear(32, WAYS))
    x, y = torch.randn(1, 240, 4), torch.randint(0, WAYS, (1, 240))
    tasks = fm.TaskBatch((x, y), (x[:, :6].contiguous(), y[:, :6].contiguous()))
    peaks = []
    for count in (1, 6):
        executor: Any = "reference" if count == 1 else "auto"
        learner = fm.MAML(model, F.cross_entropy, LR, 2, micro_batches=count, executor=executor, plan="dense")
        learner.value_and_grad(tasks)
        with LiveBytes() as live:
            learner.value_and_grad(tasks)
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] / 4
    table = learner.explain(tasks)
    assert table.recomputes
    assert peaks[1] <= table.peak < 1.5 * peaks[1]
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

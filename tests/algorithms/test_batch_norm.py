"""Each named mode of batch norm against an explicit loop over ``nn.BatchNorm``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, labelled
from tests.algorithms.test_maml_plus_plus import images, normed
from tests.oracle import relative_error

LR, STEPS = 0.2, 3
LIMIT = 0.9  # of the support loss, below which some tasks are after one step, and all after two


def network() -> nn.Sequential:
    """Batch norm that has seen something, so that running statistics are not those of a fresh one."""
    model = normed()
    torch.manual_seed(3)
    with torch.no_grad():
        model[1].running_mean.normal_(0, 0.3)
        model[1].running_var.uniform_(0.5, 2)
    model[1].momentum = 0.3
    return model


Loop = tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]


def by_hand(
    model: nn.Sequential, tasks: fm.TaskBatch, mode: str, names: list[str], looks: Any = None, limit: float = -1.0
) -> Loop:
    """Mean loss, query outputs, meta-gradients and the model's buffers after a loop over tasks; see docs/algorithms.md.

    Buffers are written in place by ``nn.BatchNorm`` itself, which does not differentiate them.
    """
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    norm, shared = model[1], {n: b.clone() for n, b in model.named_buffers()}
    looks = [0.0] * STEPS + [1.0] if looks is None else looks

    def passed(phi: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, query: bool, leaves: bool) -> Tensor:
        norm.train({"running": False, "per_task": not query}.get(mode, True))
        own = buffers if leaves else {n: b.clone() for n, b in buffers.items()}
        return functional_call(model, {**phi, **own}, (x,))

    losses, logits = [], []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        phi, buffers = dict(theta), shared if mode == "followed" else {n: b.clone() for n, b in shared.items()}
        follows, goes, loss = mode in ("followed", "per_task"), True, torch.zeros((), dtype=torch.float64)
        for k in range(STEPS):
            if looks[k]:
                loss = loss + looks[k] * F.cross_entropy(passed(phi, buffers, xq, True, False), yq)
            if not goes:
                continue
            inner = F.cross_entropy(passed(phi, buffers, xs, False, follows), ys)
            g = torch.autograd.grad(inner, [phi[n] for n in names], create_graph=True)
            goes = bool(inner >= limit)
            if goes:
                phi |= {n: phi[n] - LR * d for n, d in zip(names, g, strict=True)}
        logits.append(passed(phi, buffers, xq, True, mode == "followed"))
        losses.append(loss + looks[STEPS] * F.cross_entropy(logits[-1], yq))
    found = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    return torch.stack(losses).mean(), torch.stack(logits), dict(zip(theta, found, strict=True)), shared


ALL = ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("mode", ["transductive", "followed", "running", "per_task"])
def test_the_meta_gradient_is_exact(mode: Any) -> None:
    tasks = images()
    loss, logits, wanted, buffers = by_hand(network(), tasks, mode, ALL)
    for settings in ({"chunk_size": 2}, {"engine": "autodiff"}):
        model = network()
        learner = fm.MAML(model, F.cross_entropy, LR, STEPS, batch_norm=mode, **settings)
        if mode != "followed":
            learner.train(mode == "running")  # the name says it, and not the training flag
        assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
        assert all(relative_error(b.double(), buffers[n].double()) <= EXACT for n, b in model.named_buffers())
        model.load_state_dict(network().state_dict())
        out = learner(tasks)
        assert relative_error(out.loss, loss) <= EXACT
        assert relative_error(out.logits, logits) <= EXACT
        before = {n: b.clone() for n, b in model.named_buffers()}
        adapted = learner.adapt(tasks)
        assert relative_error(adapted(tasks.query[0]), logits) <= EXACT
        copied = adapted.module(1)
        assert relative_error(copied(tasks.query[0][1]), logits[1]) <= EXACT
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
        assert model[1].training == (learner.training if mode != "followed" else True)
        if mode == "per_task":
            assert adapted.statistics["1.running_mean"].shape == (len(tasks), 4)
            alone = learner.adapt(tasks.task(1)[0])
            assert relative_error(alone.statistics["1.running_mean"], adapted.statistics["1.running_mean"][1]) <= EXACT
            assert torch.equal(copied[1].running_mean, adapted.statistics["1.running_mean"][1])
            if learner.engine == "auto":
                executor = learner.explain(tasks).executor
                assert "because tasks have running statistics of their own" in executor


def test_followed_is_running_in_evaluation_mode() -> None:
    model, tasks = network(), images()
    learner = fm.MAML(model, F.cross_entropy, LR, STEPS, batch_norm="followed").eval()
    before = model[1].running_mean.clone()
    _, logits, wanted, _ = by_hand(network(), tasks, "running", ALL)
    assert relative_error(learner(tasks).logits, logits) <= EXACT
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
    assert torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("engine", ["program", "autodiff"])
def test_clones_and_a_head_that_adapts_alone_and_a_loss_at_every_step(engine: Any) -> None:
    tasks, names = images(), ALL[4:]
    learner = fm.MAMLPlusPlus(
        network(), F.cross_entropy, LR, STEPS, parameters=names, batch_norm="per_task", engine=engine
    )
    assert learner.norms is None
    weights = learner.loss_weights()
    _, logits, wanted, _ = by_hand(network(), tasks, "per_task", names, weights)
    assert relative_error(learner(tasks).logits, logits) <= EXACT
    found = learner.value_and_grad(tasks)[1]
    assert relative_error({n: found[n] for n in wanted}, wanted) <= EXACT


@pytest.mark.parametrize("mode", ["followed", "per_task"])
def test_statistics_of_tasks_that_stop_early(mode: Any) -> None:
    tasks = images()
    _, logits, wanted, buffers = by_hand(network(), tasks, mode, ALL, limit=LIMIT)
    for engine in ("program", "autodiff"):
        model = network()
        stop = fm.inner.EarlyStop(loss=LIMIT)
        learner = fm.MAML(model, F.cross_entropy, LR, STEPS, batch_norm=mode, stop=stop, engine=engine)
        out = learner(tasks)
        assert len({*out.steps_taken.tolist()}) > 1
        assert relative_error(out.logits, logits) <= EXACT
        assert all(relative_error(b.double(), buffers[n].double()) <= EXACT for n, b in model.named_buffers())
        model.load_state_dict(network().state_dict())
        assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


def test_clones_with_a_cumulative_average_run_on_autodiff() -> None:
    def cumulative() -> nn.Sequential:
        model = network()
        model[1].momentum = None
        return model

    tasks = images()
    _, logits, wanted, _ = by_hand(cumulative(), tasks, "per_task", ALL)
    learner = fm.MAML(cumulative(), F.cross_entropy, LR, STEPS, batch_norm="per_task")
    with pytest.warns(UserWarning, match="running on the slower autodiff engine"):
        assert relative_error(learner(tasks).logits, logits) <= EXACT
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


def test_other_algorithms() -> None:
    tasks, model = images(), network()
    _, logits, _, _ = by_hand(copy.deepcopy(model), tasks, "per_task", ALL)
    reptile = fm.Reptile(model, F.cross_entropy, LR, STEPS, batch_norm="per_task")
    assert relative_error(reptile(tasks).logits, logits) <= EXACT
    proto = fm.ProtoMAML(model, F.cross_entropy, LR, STEPS, batch_norm="running")
    plain = fm.ProtoMAML(copy.deepcopy(model).eval(), F.cross_entropy, LR, STEPS, engine="autodiff")
    assert relative_error(proto(tasks).logits, plain(tasks).logits) <= EXACT
    assert relative_error(proto.adapt(tasks)(tasks.query[0]), plain(tasks).logits) <= EXACT


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="MAML: batch_norm must be None or one of"):
        fm.MAML(model, F.cross_entropy, batch_norm="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'per_step'; MAMLPlusPlus has rows a step"):
        fm.MAML(model, F.cross_entropy, batch_norm="per_step")
    for name in ("transductive", "running", "per_task"):
        with pytest.raises(ValueError, match="MAML: update_running_stats must be False with batch_norm"):
            fm.MAML(model, F.cross_entropy, batch_norm=name, update_running_stats=True)  # type: ignore[arg-type]
    for name in ("followed", "running", "per_task"):
        with pytest.raises(ValueError, match=r"needs running statistics, got track_running_stats=False for \['1'\]"):
            fm.MAML(normed(track=False), F.cross_entropy, batch_norm=name)  # type: ignore[arg-type]
    for made in (fm.ProtoMAML, fm.Reptile, fm.IMAML):
        with pytest.raises(ValueError, match="with this algorithm, got 'followed'"):
            made(model, F.cross_entropy, batch_norm="followed")
    with pytest.raises(ValueError, match="with this algorithm, got 'per_task'"):
        fm.ProtoMAML(model, F.cross_entropy, batch_norm="per_task")
    with pytest.raises(RuntimeError, match="tasks have running statistics of their own"):
        fm.MAML(model, F.cross_entropy, batch_norm="per_task", executor="native")(images())
    masked = labelled()
    weights = torch.ones(3, 12, dtype=torch.float64)
    weights[0, -1] = 0
    tasks = fm.TaskBatch(masked.support, (*masked.query, weights))
    flat = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match="MAML: query has zero weights"):
        fm.MAML(flat, F.cross_entropy, batch_norm="transductive")(tasks)
    fm.MAML(flat, F.cross_entropy, batch_norm="per_task")(tasks)  # whose query samples do not meet

"""Tasks that take no further inner steps, against an explicit loop that breaks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, labelled, network
from tests.algorithms.test_maml_plus_plus import images, normed
from tests.oracle import relative_error

STEPS = 4
STOPS = {"plain": 1.14, "momentum": 1.15, "adam": 1.05}  # where some tasks end after one step, or two, and some go on
DOUBLE = {"dtype": torch.float64}

State = list[dict[str, Tensor]]


def plain(phi: Tensor, g: Tensor, state: Any, rate: Tensor) -> tuple[Tensor, Any]:
    return phi - rate * g, None


def momentum(phi: Tensor, g: Tensor, state: Any, rate: Tensor, mu: Tensor) -> tuple[Tensor, Any]:
    buffer = g if state is None else mu * state + g
    return phi - rate * buffer, buffer


def adam(phi: Tensor, g: Tensor, state: Any, rate: Tensor) -> tuple[Tensor, Any]:
    k, m, v = (0, 0.0, 0.0) if state is None else state
    k, m, v = k + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return phi - rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8), (k, m, v)


def by_hand(
    model: nn.Module,
    tasks: fm.TaskBatch,
    rates: Tensor,
    update: Any,
    stop: fm.inner.EarlyStop,
    more: dict[str, Tensor],
    clip: float | None = None,
    names: list[str] | None = None,
) -> tuple[dict[str, Tensor], list[int], Tensor]:
    """Meta-gradients by name, the number of steps of each task, and support losses as they are reported."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    names = list(theta) if names is None else names
    losses, taken, shown = [], [], []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        phi, states, seen, count = dict(theta), dict[str, Any](), list[Tensor](), 0
        for k in range(STEPS):
            loss = F.cross_entropy(functional_call(model, phi, (xs,)), ys)
            seen.append(loss.detach())
            g = torch.autograd.grad(loss, [phi[n] for n in names], create_graph=True)
            norm = torch.cat([d.flatten() for d in g]).norm()
            if stop.loss is not None and loss < stop.loss:
                break
            if stop.gradient_norm is not None and norm < stop.gradient_norm:
                break
            count += 1
            for n, d in zip(names, g, strict=True):
                d = d if clip is None else d * torch.clamp(clip / (norm + 1e-6), max=1.0)
                phi[n], states[n] = update(phi[n], d, states.get(n), rates[k], *more.values())
        shown.append(torch.stack(seen + seen[-1:] * (STEPS - len(seen))))
        taken.append(count)
        losses.append(F.cross_entropy(functional_call(model, phi, (xq,)), yq))
    wanted = {**theta, "inner.lr": rates, **more}
    found = torch.autograd.grad(torch.stack(losses).mean(), list(wanted.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if d is None else d for (n, p), d in zip(wanted.items(), found, strict=True)}
    return gradients, taken, torch.stack(shown, 1)


def rule(kind: str) -> tuple[Any, Tensor, Any, dict[str, Tensor]]:
    size = 0.05 if kind == "adam" else 0.4
    rates = torch.tensor([size, 0.7 * size, 1.2 * size, size], **DOUBLE, requires_grad=True)
    if kind == "plain":
        return fm.inner.SGD(rates), rates, plain, {}
    if kind == "adam":
        return fm.inner.Adam(rates), rates, adam, {}
    mu = torch.tensor(0.5, **DOUBLE, requires_grad=True)
    return fm.inner.SGD(rates, momentum=mu), rates, momentum, {"inner.momentum": mu}


def test_the_meta_gradient_is_exact() -> None:
    model, tasks = network(), labelled()
    learner = fm.MAML(model, F.cross_entropy, inner=fm.inner.SGD(0.1), steps=STEPS)
    for kind, limit in STOPS.items():
        learner.inner, rates, update, more = rule(kind)
        learner.stop = fm.inner.EarlyStop(loss=limit)
        wanted, taken, shown = by_hand(model, tasks, rates, update, learner.stop, more)
        assert len({*taken}) > 1
        assert min(taken) < STEPS
        for learner.engine, learner.chunk_size in (("program", None), ("program", 2), ("autodiff", None)):
            out = learner(tasks)
            assert out.steps_taken.tolist() == taken
            assert relative_error(out.support_losses, shown) <= EXACT
            assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
            adapted = learner.adapt(tasks)
            assert adapted.steps_taken.tolist() == taken
            assert relative_error(adapted(tasks.query[0]), out.logits) <= EXACT
        learner.engine, learner.memory_budget = "auto", 1
        with warnings.catch_warnings(action="ignore"):  # that it is too small
            assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
        learner.memory_budget = None
    learner.inner = fm.inner.SGD(0.1)
    assert "because tasks may end before the last inner step" in learner.explain(tasks).executor


def test_norms_clipping_and_a_body_that_runs_once() -> None:
    model, tasks = network(), labelled()
    inner, rates, update, more = rule("momentum")
    stop, names = fm.inner.EarlyStop(gradient_norm=0.2), ["4.weight", "4.bias"]
    wanted, taken, _ = by_hand(model, tasks, rates, update, stop, more, clip=0.22, names=names)
    assert len({*taken}) > 1
    learner = fm.ANIL(model, F.cross_entropy, inner=inner, steps=STEPS, stop=stop, clip_norm=0.22)
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT
    assert learner(tasks).steps_taken.tolist() == taken


def test_none_all_and_other_algorithms() -> None:
    model, tasks = network(), labelled()
    never = fm.inner.EarlyStop(loss=-1.0)
    learner = fm.MAML(model, F.cross_entropy, 0.3, STEPS, stop=never)
    whole = fm.MAML(model, F.cross_entropy, 0.3, STEPS)
    assert relative_error(learner.value_and_grad(tasks)[1], whole.value_and_grad(tasks)[1]) <= EXACT
    assert learner(tasks).steps_taken.tolist() == [STEPS] * 3
    assert whole(tasks).steps_taken is None
    learner.stop = fm.inner.EarlyStop(loss=100.0)  # nothing is adapted
    assert relative_error(learner.value_and_grad(tasks)[1], whole.value_and_grad(tasks, steps=0)[1]) <= EXACT
    assert learner(tasks).steps_taken.tolist() == [0] * 3
    imaml = fm.IMAML(model, F.cross_entropy, 0.3, 60, stop=fm.inner.EarlyStop(gradient_norm=1e-2))
    out = imaml(tasks)
    assert out.steps_taken.max() < 60
    assert imaml.solution.stationarity.max() < 1e-2
    reptile = fm.Reptile(model, F.cross_entropy, 0.4, STEPS, stop=fm.inner.EarlyStop(loss=1.14))
    out = reptile(tasks)
    assert out.steps_taken.min() < STEPS
    single = reptile.adapt(tasks.task(0)[0])
    assert single.steps_taken == out.steps_taken[0]


def test_a_loss_and_batch_norm_of_every_step_by_either_engine() -> None:
    tasks, results = images(), []
    for engine in ("program", "autodiff"):
        stop = fm.inner.EarlyStop(loss=0.9)
        learner = fm.MAMLPlusPlus(normed(), F.cross_entropy, 0.2, STEPS, stop=stop, engine=engine)
        taken = learner(tasks).steps_taken
        assert len({*taken.tolist()}) > 1
        found = learner.value_and_grad(tasks)[1]
        rows = learner.norms.tensors(statistics=True) if learner.norms else {}
        results.append(found | {n: b.double() for n, b in rows.items()} | {"taken": taken.double()})
    assert "1.running_mean" in results[0]
    assert relative_error(results[0], results[1]) <= EXACT


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="EarlyStop: loss or gradient_norm must be given"):
        fm.inner.EarlyStop()
    with pytest.raises(ValueError, match="EarlyStop: gradient_norm must be positive and finite, got 0"):
        fm.inner.EarlyStop(gradient_norm=0.0)
    with pytest.raises(TypeError, match="EarlyStop: loss must be a number or None"):
        fm.inner.EarlyStop(loss="0.1")  # type: ignore[arg-type]
    stop = fm.inner.EarlyStop(loss=0.1)
    with pytest.raises(TypeError, match="MAML: stop must be a"):
        fm.MAML(network(), F.cross_entropy, stop=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MAML: plan must not be 'factored' with stop"):
        fm.MAML(network(), F.cross_entropy, stop=stop, plan="factored")
    with pytest.raises(RuntimeError, match="tasks may end before the last inner step"):
        fm.MAML(network(), F.cross_entropy, stop=stop, executor="native")(labelled())

"""MAML++ against an explicit loop with a loss, rates and batch norm for every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, WAYS, labelled, network
from tests.oracle import relative_error

STEPS = 3


def normed(track: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=track), nn.Tanh(), nn.Flatten(), nn.Linear(16, WAYS)
    ).double()
    nn.init.normal_(model[1].weight, 1, 0.2)
    return model


def images() -> fm.TaskBatch:
    plain = labelled(features=16)
    return fm.TaskBatch(*[(x.reshape(*x.shape[:2], 1, 4, 4), y) for x, y in (plain.support, plain.query)])


def shaken(learner: fm.MAMLPlusPlus) -> None:
    """Rates and rows that differ from step to step."""
    torch.manual_seed(5)
    with torch.no_grad():
        rule = learner if learner.inner is None else learner.inner
        rule.lr += 0.05 * torch.randn_like(rule.lr)
        for value in learner.norms.parameters() if learner.norms is not None else ():
            value += 0.2 * torch.randn_like(value)


def by_hand(
    learner: fm.MAMLPlusPlus,
    tasks: fm.TaskBatch,
    names: list[str],
    weights: Any,
    *,
    steps: int = STEPS,
    momentum: float = 0.0,
    adam: bool = False,
    training: bool = True,
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Mean loss, query outputs, what is learned by name, and running statistics after a loop over tasks."""
    model = learner.model
    norm = next((n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)), None)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    rates = (learner.lr if learner.inner is None else learner.inner.lr).detach().clone().requires_grad_()
    rows: dict[str, Tensor] = {}
    if learner.norms is not None:
        rows = {n: v.detach().clone().requires_grad_() for n, v in learner.norms.tensors(statistics=False).items()}
        theta = {n: p for n, p in theta.items() if n not in rows}
    statistics = {n: b.detach().clone() for n, b in model.named_buffers() if "num" not in n}
    if learner.norms is not None:
        statistics = {n: b.clone() for n, b in learner.norms.tensors(statistics=True).items()}

    def evaluate(phi: dict[str, Tensor], x: Tensor, k: int, follow: bool) -> Tensor:
        """The network by its own formulas, so that what batch norm reads is plain to see."""
        if norm is None:
            return functional_call(model, phi, (x,))
        row = {n: v[min(k, len(v) - 1)] for n, v in rows.items()} or phi
        h = F.conv2d(x, phi["0.weight"], phi["0.bias"])
        if training:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            if follow and statistics:
                place = min(k, len(next(iter(rows.values()))) - 1)
                for part, value in (("running_mean", mean), ("running_var", h.var((0, 2, 3)))):
                    statistics[f"{norm}.{part}"][place].mul_(0.9).add_(0.1 * value.detach())
        else:
            mean, var = (statistics[f"{norm}.{part}"][min(k, STEPS)] for part in ("running_mean", "running_var"))
        shape = (1, -1, 1, 1)
        h = (h - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        h = h * row[f"{norm}.weight"].view(shape) + row[f"{norm}.bias"].view(shape)
        return F.linear(torch.tanh(h).flatten(1), phi["4.weight"], phi["4.bias"])

    losses, logits = [], []
    for t in range(len(tasks)):
        (xs, ys), (xq, yq) = tasks.task(t)
        phi, loss, buffer = dict(theta), torch.zeros((), dtype=torch.float64), dict[str, Tensor]()
        moments = dict[str, tuple[Tensor, Tensor]]()
        for k in range(steps):
            if weights[k]:
                loss = loss + weights[k] * F.cross_entropy(evaluate(phi, xq, k, False), yq)
            inner = F.cross_entropy(evaluate(phi, xs, k, True), ys)
            g = torch.autograd.grad(inner, [phi[n] for n in names], create_graph=not learner.first_order)
            for j, (n, d) in enumerate(zip(names, g, strict=True)):
                buffer[n] = momentum * buffer[n] + d if n in buffer else d
                if adam:
                    m, v = moments.get(n, (torch.zeros_like(d), torch.zeros_like(d)))
                    m, v = moments[n] = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
                    buffer[n] = m / (1 - 0.9 ** (k + 1)) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                phi[n] = phi[n] - rates[min(k, len(rates) - 1), j] * buffer[n]
        logits.append(evaluate(phi, xq, steps, True))
        losses.append(loss + weights[steps] * F.cross_entropy(logits[-1], yq))
    mean_loss = torch.stack(losses).mean()
    learned = {**theta, **rows, "lr" if learner.inner is None else "inner.lr": rates}
    found = torch.autograd.grad(mean_loss, list(learned.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(p) if d is None else d for (n, p), d in zip(learned.items(), found, strict=True)}
    return mean_loss, torch.stack(logits), gradients, statistics


PLAIN = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
CONV = ["0.weight", "0.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("engine", ["program", "autodiff"])
def test_the_meta_gradient_is_exact(engine: Any) -> None:
    model, tasks = network(), labelled()
    learner = fm.MAMLPlusPlus(
        model, F.cross_entropy, 0.2, STEPS, multi_step_epochs=8, first_order_epochs=2, engine=engine, chunk_size=2
    )
    shaken(learner)
    for learner.epoch in (0, 9, 4):
        assert learner.first_order == (learner.epoch < 2)
        loss, logits, wanted, _ = by_hand(learner, tasks, PLAIN, learner.loss_weights())
        value, found = learner.value_and_grad(tasks)
        assert relative_error(value, loss) <= EXACT
        assert relative_error(found, wanted) <= EXACT
    out = learner(tasks)
    out.loss.backward()
    assert relative_error(out.logits, logits) <= EXACT
    assert relative_error(learner.lr.grad, wanted["lr"]) <= EXACT
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, {n: wanted[n] for n in PLAIN}) <= EXACT


def test_weights_that_no_task_forms() -> None:
    plan = {"2.weight": "factored", "*": "dense"}
    model, tasks = network(), labelled()
    learner = fm.MAMLPlusPlus(model, F.cross_entropy, 0.2, STEPS, plan=plan)
    shaken(learner)
    _, _, wanted, _ = by_hand(learner, tasks, PLAIN, learner.loss_weights())
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


@pytest.mark.parametrize("executor", ["native", "reference"])
def test_rates_alone_run_on_either_executor(executor: Any) -> None:
    from fastmeta.core import native

    if executor == "native" and native.extension() is None:
        pytest.skip(native.missing_reason())
    model, tasks = network(), labelled()
    learner = fm.MAMLPlusPlus(model, F.cross_entropy, 0.2, STEPS, multi_step_epochs=0, executor=executor)
    shaken(learner)
    for steps in (STEPS, 2, 5):
        weights = [*[0.0] * steps, 1.0]
        loss, _, wanted, _ = by_hand(learner, tasks, PLAIN, weights, steps=steps)
        value, found = learner.value_and_grad(tasks, steps=steps)
        assert relative_error(value, loss) <= EXACT
        assert relative_error(found, wanted) <= EXACT


@pytest.mark.parametrize("engine", ["program", "autodiff"])
@pytest.mark.parametrize("head_alone", [False, True])
def test_batch_norm_has_rows_that_are_used(head_alone: bool, engine: Any) -> None:
    """Learned scales and shifts, statistics of training, and what is made of them in evaluation."""
    model, tasks = normed(), images()
    names = CONV[2:] if head_alone else CONV
    learner = fm.MAMLPlusPlus(
        model, F.cross_entropy, 0.2, STEPS, parameters=["4.*"] if head_alone else None, engine=engine
    )
    shaken(learner)
    assert learner.norms is not None
    for _ in range(2):
        loss, logits, wanted, statistics = by_hand(learner, tasks, names, learner.loss_weights())
        value, found = learner.value_and_grad(tasks)
        assert relative_error(value, loss) <= EXACT
        assert relative_error(found, wanted) <= EXACT
        assert relative_error(learner.norms.tensors(statistics=True), statistics) <= EXACT
    assert (model[1].running_mean == 0).all()
    learner(tasks).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in learner.norms.parameters())
    learner.eval()
    for steps in (STEPS, 5):
        weights = [*[0.0] * steps, 1.0]
        loss, logits, wanted, _ = by_hand(learner, tasks, names, weights, steps=steps, training=False)
        out = learner(tasks, steps=steps)
        assert relative_error(out.loss, loss) <= EXACT
        assert relative_error(out.logits, logits) <= EXACT
        assert relative_error(learner.value_and_grad(tasks, steps=steps)[1], wanted) <= EXACT
        adapted = learner.adapt(tasks, steps=steps)
        assert relative_error(adapted(tasks.query[0]), logits) <= EXACT
        assert relative_error(adapted.module(1)(tasks.query[0][1]), logits[1]) <= EXACT


@pytest.mark.parametrize("adam", [False, True])
def test_it_goes_with_other_inner_rules(adam: bool) -> None:
    model, tasks = network(), labelled()
    rule = fm.inner.Adam(0.2) if adam else fm.inner.SGD(0.2, momentum=0.5)
    learner = fm.MAMLPlusPlus(model, F.cross_entropy, steps=STEPS, inner=rule, parameters=["4.*"])
    shaken(learner)
    assert rule.lr == 0.2
    assert learner.inner.lr.shape == (STEPS, 2)
    _, _, wanted, _ = by_hand(learner, tasks, PLAIN[4:], learner.loss_weights(), momentum=0.5, adam=adam)
    assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


def test_a_memory_budget_and_another_objective() -> None:
    model, tasks = network(), labelled()
    learner = fm.MAMLPlusPlus(model, F.cross_entropy, 0.2, STEPS)
    shaken(learner)
    _, _, wanted, _ = by_hand(learner, tasks, PLAIN, learner.loss_weights())
    (learner(tasks).task_losses / len(tasks)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert relative_error(found, {n: wanted[n] for n in PLAIN}) <= EXACT
    learner.memory_budget = 1
    with pytest.warns(UserWarning, match="memory_budget is 1 bytes"):
        assert relative_error(learner.value_and_grad(tasks)[1], wanted) <= EXACT


def test_the_schedules() -> None:
    learner = fm.MAMLPlusPlus(network(), F.cross_entropy, steps=5, multi_step_epochs=10)
    assert learner.loss_weights(0) == pytest.approx((0, 0.2, 0.2, 0.2, 0.2, 0.2))
    assert learner.loss_weights(5) == pytest.approx((0, 0.1, 0.1, 0.1, 0.1, 0.6))
    assert learner.loss_weights(9) == pytest.approx((0, 0.02, 0.02, 0.02, 0.02, 0.92))
    assert learner.loss_weights(10) == (0, 0, 0, 0, 0, 1)
    with torch.no_grad():  # evaluation: the last step alone counts
        tasks = labelled()
        out = learner(tasks)
        assert out.loss == F.cross_entropy(out.logits.flatten(0, 1), tasks.query[1].flatten())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="MAMLPlusPlus: first_order must be left out"):
        fm.MAMLPlusPlus(network(), F.cross_entropy, first_order=True)
    with pytest.raises(TypeError, match="MAMLPlusPlus: lr must be a number"):
        fm.MAMLPlusPlus(network(), F.cross_entropy, torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MAMLPlusPlus: steps must be at least 1"):
        fm.MAMLPlusPlus(network(), F.cross_entropy, steps=0)
    with pytest.raises(ValueError, match="MAMLPlusPlus: at least one parameter beside batch norm's"):
        fm.MAMLPlusPlus(normed(), F.cross_entropy, parameters=["1.*"])

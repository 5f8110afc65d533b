"""FOMAML, ANIL, BOIL, Meta-SGD and Reptile against explicit loops over tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fastmeta as fm
from tests.algorithms.problems import EXACT, WAYS, gradients, labelled, network
from tests.oracle import maml_loop, relative_error

HEAD, BODY = ["4.weight", "4.bias"], ["0.weight", "0.bias", "2.weight", "2.bias"]

CASES: dict[str, tuple[type[fm.MAML], dict[str, Any], bool, list[str] | None]] = {
    "fomaml": (fm.FOMAML, {}, True, None),
    "anil": (fm.ANIL, {}, False, HEAD),
    "anil with a named head": (fm.ANIL, {"head": ["2", "4.*"]}, False, ["2.weight", "2.bias", *HEAD]),
    "boil": (fm.BOIL, {}, False, BODY),
    "boil with a named head": (fm.BOIL, {"head": "4.bias"}, False, [*BODY, "4.weight"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_meta_gradient_is_exact(case: str) -> None:
    algorithm, options, first_order, names = CASES[case]
    model, tasks = network(), labelled()
    learner = algorithm(model, F.cross_entropy, 0.3, 3, **options)
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.3, 3, first_order, names)
    for learner.executor in ("reference", "auto"):
        loss, found = learner.value_and_grad(tasks)
        assert relative_error(loss, truth[0]) <= EXACT
        assert relative_error(found, truth[3]) <= EXACT
    learner(tasks).loss.backward()
    assert relative_error(gradients(model), truth[3]) <= EXACT


@pytest.mark.parametrize("engine", ["program", "autodiff"])
def test_meta_sgd_learns_a_rate_for_every_element(engine: Any) -> None:
    model, tasks = network(), labelled()
    learner = fm.MetaSGD(model, F.cross_entropy, 0.2, 3, parameters=["2.*", "4.*"], engine=engine)
    names = [*BODY[2:], *HEAD]
    own = dict(learner.named_parameters())
    torch.manual_seed(3)
    for name in names:
        rate = own[f"lr.{name.replace('.', '/')}"]
        assert rate.shape == own[f"model.{name}"].shape
        assert (rate == 0.2).all()
        rate.data += 0.1 * torch.randn_like(rate)
    rates = {n: own[f"lr.{n.replace('.', '/')}"].detach().clone().requires_grad_() for n in names}
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, rates, 3, False, names)
    assert relative_error(learner.value_and_grad(tasks)[1], truth[3]) <= EXACT
    learner(tasks).loss.backward()
    assert relative_error(own["lr.2/weight"].grad, truth[3]["lr.2.weight"]) <= EXACT


def adapted_by_hand(model: nn.Module, tasks: fm.TaskBatch, lr: float, steps: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for t in range(len(tasks)):
        (x, y), _ = tasks.task(t)
        phi = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        for _ in range(steps):
            g = torch.autograd.grad(F.cross_entropy(functional_call(model, phi, (x,)), y), list(phi.values()))
            phi = {n: (p - lr * d).detach().requires_grad_() for (n, p), d in zip(phi.items(), g, strict=True)}
        found.append(phi)
    return found


@pytest.mark.parametrize("engine", ["program", "autodiff"])
@pytest.mark.parametrize("query", [True, False])
def test_reptile_goes_towards_the_adapted_weights(query: bool, engine: Any) -> None:
    model, tasks = network(), labelled()
    tasks = tasks if query else fm.TaskBatch(tasks.support)
    learner = fm.Reptile(model, F.cross_entropy, 0.3, 4, engine=engine, chunk_size=2)
    phis = adapted_by_hand(model, tasks, 0.3, 4)
    truth = {n: p.detach() - sum(phi[n].detach() for phi in phis) / len(phis) for n, p in model.named_parameters()}
    value, found = learner.value_and_grad(tasks)
    assert relative_error(found, truth) <= EXACT
    out = learner(tasks)
    (2 * out.loss).backward()
    assert relative_error(gradients(model), {n: 2 * d for n, d in truth.items()}) <= EXACT
    assert torch.equal(out.loss, value)
    if query:
        logits = [functional_call(model, phi, (tasks.query[0][t],)) for t, phi in enumerate(phis)]
        losses = [F.cross_entropy(z, tasks.query[1][t]) for t, z in enumerate(logits)]
        assert relative_error(out.task_losses, torch.stack(losses)) <= EXACT
        assert relative_error(out.logits, torch.stack(logits)) <= EXACT
        with torch.no_grad():
            assert relative_error(learner(tasks).logits, out.logits) <= EXACT
    else:
        assert out.logits is None
        assert relative_error(out.task_losses, out.support_losses[-1]) <= EXACT


def test_reptile_with_sgd_is_the_batched_version_of_the_paper() -> None:
    """theta + epsilon mean (phi - theta), and with one task a batch the serial one."""
    for tasks in (labelled(), labelled()[:1]):
        model = network()
        learner = fm.Reptile(model, F.cross_entropy, 0.3, 2)
        phis = adapted_by_hand(model, tasks, 0.3, 2)
        wanted = {
            n: p.detach() + 0.5 * sum(phi[n].detach() - p.detach() for phi in phis) / len(phis)
            for n, p in model.named_parameters()
        }
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
        learner(tasks).loss.backward()
        optimizer.step()
        assert relative_error(dict(model.named_parameters()), wanted) <= EXACT


@pytest.mark.parametrize("algorithm", [fm.ANIL, fm.BOIL, fm.MetaSGD, fm.Reptile])
def test_it_learns(algorithm: type[fm.MAML]) -> None:
    """Classes lie around centres of their own that labels are drawn for anew: only adaptation tells them apart."""
    torch.manual_seed(0)
    centres = torch.randn(12, 6)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, WAYS))
    learner = algorithm(model, F.cross_entropy, 0.3, 4)
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)

    def sample(tasks: int) -> fm.TaskBatch:
        chosen = torch.stack([torch.randperm(12)[:WAYS] for _ in range(tasks)])
        labels = torch.arange(WAYS).repeat(4).expand(tasks, -1).contiguous()
        x = centres[chosen.gather(1, labels)] + 0.4 * torch.randn(tasks, 4 * WAYS, 6)
        return fm.TaskBatch((x[:, :WAYS], labels[:, :WAYS]), (x[:, WAYS:], labels[:, WAYS:]))

    held_out = sample(40)

    def judged() -> float:
        with torch.no_grad():
            return float(learner(held_out).loss)

    before = judged()
    for _ in range(60):
        optimizer.zero_grad()
        learner(sample(8)).loss.backward()
        optimizer.step()
    assert judged() < 0.8 * before


def test_what_does_not_fit_is_refused() -> None:
    model = network()
    with pytest.raises(TypeError, match="FOMAML: first_order must be left out"):
        fm.FOMAML(model, F.cross_entropy, first_order=False)
    with pytest.raises(TypeError, match="ANIL: parameters must be left out"):
        fm.ANIL(model, F.cross_entropy, parameters=["4.*"])
    with pytest.raises(ValueError, match="ANIL: head must name submodules or parameters"):
        fm.ANIL(model, F.cross_entropy, head="classifier")
    with pytest.raises(ValueError, match="BOIL: head must leave parameters for the body"):
        fm.BOIL(model, F.cross_entropy, head="*")
    with pytest.raises(ValueError, match="BOIL: model must have parameters"):
        fm.BOIL(nn.Tanh(), F.cross_entropy)
    with pytest.raises(TypeError, match="MetaSGD: lr must be a number"):
        fm.MetaSGD(model, F.cross_entropy, torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MetaSGD: lr must be finite"):
        fm.MetaSGD(model, F.cross_entropy, float("nan"))
    with pytest.raises(TypeError, match="MetaSGD: inner must be left out"):
        fm.MetaSGD(model, F.cross_entropy, inner=fm.inner.SGD(0.1))
    with pytest.raises(TypeError, match=r"Reptile: .*first_order.* must be left out"):
        fm.Reptile(model, F.cross_entropy, first_order=True)
    with pytest.raises(ValueError, match="Reptile: steps must be at least 1"):
        fm.Reptile(model, F.cross_entropy)(labelled(), steps=0)
    with pytest.raises(ValueError, match="Reptile: rates must be fixed"):
        fm.Reptile(model, F.cross_entropy, torch.tensor(0.1, requires_grad=True))(labelled())

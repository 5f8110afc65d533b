"""Compressed bases: what was fixed stays, to the bit, and meta-gradients are those of an explicit loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from examples import compressed
from tests.oracle import maml_loop, relative_error

LR, STEPS, TASKS = 0.3, 3, 4
FORMS = {
    "pruned": lambda model: compressed.pruned(model, 0.7),
    "quantised body": compressed.quantised,
    "int8 body": lambda model: compressed.int8(model, 2),
}


def made(kind: str) -> nn.Sequential:
    model = compressed.network(16)
    if kind == "quantised body":  # its kernels know float32 alone; the head is float64
        form = compressed.quantised(model)
        form[1].double()
        return form
    return FORMS[kind](model.double())


def digits() -> fm.TaskBatch:
    def part(n: int):
        return torch.rand(TASKS, n, 1, 8, 8, dtype=torch.float64), torch.randint(compressed.WAYS, (TASKS, n))

    return fm.TaskBatch(part(5), part(7))


@pytest.mark.parametrize("kind", FORMS)
def test_meta_gradient_agrees_with_the_loop(kind) -> None:
    model, tasks = made(kind), digits()
    learner = compressed.learner_of(kind, model)
    loss, grads = learner.value_and_grad(tasks)
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, LR, STEPS)
    assert relative_error(loss, truth[0]) < 1e-12
    assert relative_error(grads, truth[3]) < 1e-9


def trained(model: nn.Module, learner: fm.MAML) -> None:
    made = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    for _ in range(3):
        made.zero_grad()
        learner(digits()).loss.backward()
        made.step()


def test_pruned_weights_are_zero_in_every_task_and_after_training() -> None:
    model, tasks = made("pruned"), digits()
    learner = compressed.learner_of("pruned", model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = learner.value_and_grad(tasks)[1]
    trained(model, learner)
    adapted = learner.adapt(tasks)
    masks = {n.replace("_mask", "_orig"): b.bool() for n, b in model.named_buffers()}
    assert len(masks) == 3
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == total - round(0.7 * total)
    for name, mask in masks.items():
        assert (grads[name][~mask] == 0).all()
        assert (dict(model.named_parameters())[name][~mask] == 0).all()
        assert (adapted.parameters[name][:, ~mask] == 0).all()
        assert (adapted.parameters[name][:, mask] != dict(model.named_parameters())[name][mask]).any()
        assert not torch.equal(dict(model.named_parameters())[name], before[name])
    alone = adapted.module(2)
    alone(tasks.query[0][2])
    for name, module in alone.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.weight[~masks[f"{name}.weight_orig"]] == 0).all()


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """What compression fixed, as bytes."""
    found = {n: b.clone() for n, b in model.named_buffers()}
    for name, module in model.named_modules():
        if hasattr(module, "_packed_params") and callable(getattr(module, "weight", None)):
            found[name] = module.weight().int_repr().clone()
            found[f"{name}.bias"] = module.bias().detach().clone()
    return found


@pytest.mark.parametrize("kind", ["quantised body", "int8 body"])
def test_what_is_quantised_keeps_every_bit(kind) -> None:
    model, tasks = made(kind), digits()
    learner = compressed.learner_of(kind, model)
    before = frozen(model)
    assert len(before) == 4
    assert sum(b.dtype == torch.int8 for b in before.values()) == 2
    head = model[1].weight.detach().clone()
    trained(model, learner)
    for name, value in frozen(model).items():
        assert torch.equal(value, before[name])
    for name, value in frozen(learner.adapt(tasks).module(1)).items():
        assert torch.equal(value, before[name])
    assert not torch.equal(model[1].weight, head)


def test_int8_weights_are_near_those_they_stand_for() -> None:
    model = compressed.network(16)
    x = torch.rand(9, 1, 8, 8)
    plain, small = model(x), compressed.int8(model, 2)(x)
    assert 0 < float((plain - small).detach().abs().max()) < 0.02


def test_learns() -> None:
    found = compressed.main(["--iterations", "80", "--more", "8", "--width", "48", "--test-tasks", "16"])
    fresh, dense = found.pop("dense")
    assert dense.mean > fresh.mean + 0.1
    assert len(found) == 3
    for before, after in found.values():
        assert after.mean > fresh.mean + 0.08
        assert after.mean > before.mean - 0.05

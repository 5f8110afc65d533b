"""Batches of every form, losses of every form, rates of every form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from tests.engine.cases import T
from tests.oracle import maml_loop, relative_error

pytestmark = pytest.mark.usefixtures("traced_once")
EXACT = 1e-9


def sets(ways: int = 3):
    return tuple((torch.randn(T, n, 4, dtype=torch.float64), torch.randint(ways, (T, n))) for n in (5, 6))


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def gradients(model, loss, tasks, **settings):
    return fm.MAML(model, loss, **{"lr": 0.1, "steps": 2, "engine": "program", **settings}).value_and_grad(tasks)[1]


class TextModel(nn.Module):
    """A model in the manner of Hugging Face: keyword arguments, its own loss, an output object."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask[..., None].to(self.table.weight.dtype)
        pooled = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        logits = self.head(torch.tanh(pooled))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def text(n: int):
    mask = torch.ones(T, n, 5, dtype=torch.long)
    mask[:, ::2, 3:] = 0
    return {"input_ids": torch.randint(9, (T, n, 5)), "attention_mask": mask, "labels": torch.randint(3, (T, n))}


def test_a_model_that_computes_its_own_loss() -> None:
    model = TextModel().double()
    support, query = text(5), text(6)

    def loss(m, batch):
        return m(**batch)["loss"]

    truth = maml_loop(model, loss, support, query, 0.1, 2)[3]
    assert relative_error(gradients(model, loss, fm.TaskBatch(support, query)), truth) <= EXACT

    def with_outputs(m, batch):
        result = m(**batch)
        return result["loss"], result["logits"]

    out = fm.MAML(model, with_outputs, lr=0.1, engine="program")(fm.TaskBatch(support, query))
    assert out.logits.shape == (T, 6, 3)


def test_inputs_as_dict_and_as_tuple() -> None:
    model = TextModel().double()
    support, query = text(5), text(6)

    def pair(batch):
        return {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"]

    def spread(batch):
        return (batch["input_ids"], batch["attention_mask"]), batch["labels"]

    def loss(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels)

    truth = maml_loop(model, lambda m, b: m(**b)["loss"], support, query, 0.1, 2)[3]
    for form in (pair, spread):
        tasks = fm.TaskBatch(form(support), form(query))
        assert relative_error(gradients(model, loss, tasks), truth) <= EXACT
        assert set(fm.MAML(model, loss)(tasks).logits) == {"loss", "logits"}


def test_unequal_tasks_are_padded_and_masked_exactly() -> None:
    model = small()
    tasks = [
        ((torch.randn(n, 4).double(), torch.randint(3, (n,))), (torch.randn(m, 4).double(), torch.randint(3, (m,))))
        for n, m in ((5, 6), (2, 6), (4, 3))
    ]
    batch = fm.TaskBatch.stack(tasks)
    assert len(batch.support) == 3
    assert batch.support[2].sum(1).tolist() == [5, 2, 4]
    one_by_one = []
    for support, query in tasks:
        lone = [tuple(x[None] for x in s) for s in (support, query)]
        one_by_one.append(maml_loop(model, F.cross_entropy, *lone, 0.1, 2)[3])
    truth = {name: sum(g[name] for g in one_by_one) / 3 for name in one_by_one[0]}
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), _weighted):
        assert relative_error(gradients(model, loss, batch), truth) <= EXACT


def _weighted(outputs, targets, weights):
    return (F.cross_entropy(outputs, targets, reduction="none") * weights).sum() / weights.sum()


def test_equal_tasks_are_stacked_without_weights() -> None:
    support, query = sets()
    batch = fm.TaskBatch.stack([fm.TaskBatch(support, query).task(t) for t in range(T)])
    assert len(batch.support) == 2
    assert torch.equal(batch.query[0], query[0])


def test_padding_under_batch_norm_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    support, query = sets()
    weights = torch.ones(T, 5).double()
    weights[1, 3:] = 0
    with pytest.raises(ValueError, match="batch norm would count the masked samples"):
        fm.MAML(model, F.cross_entropy)(fm.TaskBatch((*support, weights), query))
    fm.MAML(model, F.cross_entropy)(fm.TaskBatch((*support, weights + 1), query)).loss.backward()


@pytest.mark.parametrize("kind", ["tensor", "step", "mapping", "element"])
@pytest.mark.parametrize("first_order", [False, True])
def test_rates_of_every_form_and_their_gradients(kind: str, first_order: bool) -> None:
    model = small()
    names = [n for n, _ in model.named_parameters()]
    rates = {
        "tensor": torch.tensor(0.1).double().requires_grad_(),
        "step": torch.tensor([0.1, 0.3]).double().requires_grad_(),
        "mapping": {n: torch.tensor(0.1 * (i + 1)).double().requires_grad_() for i, n in enumerate(names)},
        "element": {n: (0.1 + 0.1 * torch.rand_like(p)).requires_grad_() for n, p in model.named_parameters()},
    }[kind]
    tasks = fm.TaskBatch(*sets())
    found = gradients(model, F.cross_entropy, tasks, lr=rates, first_order=first_order)
    truth = gradients(model, F.cross_entropy, tasks, lr=rates, first_order=first_order, engine="autodiff")
    assert relative_error(found, truth) <= EXACT
    assert any(name.startswith("lr") for name in found)
    leaves = list(rates.values()) if isinstance(rates, dict) else [rates]
    maml = fm.MAML(model, F.cross_entropy, lr=rates, steps=2, first_order=first_order, engine="program")
    maml(tasks).loss.backward()
    for leaf, name in zip(leaves, [n for n in truth if n.startswith("lr")], strict=True):
        assert relative_error(leaf.grad, truth[name]) <= EXACT


def test_learned_rates_are_parameters_of_the_module() -> None:
    model = small()
    rates = {n: nn.Parameter(torch.full_like(p, 0.1)) for n, p in model.named_parameters()}
    maml = fm.MAML(model, F.cross_entropy, lr=rates)
    assert sum(p.numel() for p in maml.parameters()) == 2 * sum(p.numel() for p in model.parameters())
    scalar = fm.MAML(model, F.cross_entropy, lr=nn.Parameter(torch.tensor(0.1).double()))
    assert "lr" in dict(scalar.named_parameters())


def test_mixed_numbers_and_row_rates_in_a_mapping() -> None:
    model = small()
    rates = {"0.weight": torch.rand(6, 1).double() + 0.1, "0.bias": 0.2, "2.weight": 0.0, "2.bias": torch.tensor(0.3)}
    tasks = fm.TaskBatch(*sets())
    found = gradients(model, F.cross_entropy, tasks, lr=rates)
    assert relative_error(found, gradients(model, F.cross_entropy, tasks, lr=rates, engine="autodiff")) <= EXACT
    adapted = fm.MAML(model, F.cross_entropy, lr=rates).adapt(tasks).parameters["2.weight"]
    assert torch.equal(adapted[0], model[2].weight)


@pytest.mark.parametrize("single", [True, False])
def test_adapt_gives_the_weights_the_loop_would(single: bool) -> None:
    model = small()
    support, query = sets()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=3)
    logits = maml(fm.TaskBatch(support, query)).logits
    if single:
        learner = maml.adapt(tuple(x[1] for x in support))
        assert relative_error(learner(query[0][1]), logits[1]) <= EXACT
        assert relative_error(learner.module()(query[0][1]), logits[1]) <= EXACT
        assert learner.support_losses.shape == (3,)
    else:
        learner = maml.adapt(fm.TaskBatch(support))
        assert relative_error(learner(query[0]), logits) <= EXACT
        assert relative_error(learner.module(2)(query[0][2]), logits[2]) <= EXACT
        assert learner.support_losses.shape == (3, T)
    assert torch.equal(maml.adapt(fm.TaskBatch(support), steps=0).parameters["0.bias"][0], model[0].bias)

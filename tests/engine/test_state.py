"""Parameters, buffers and modules of every kind: what adapts, what stays, what is shared, what is written."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastmeta as fm
from tests.engine.cases import CASES, T
from tests.oracle import maml_loop, relative_error

EXACT = 1e-9


def sets(*shape: int, ways: int = 3):
    def one(n: int):
        return torch.randn(T, n, *shape, dtype=torch.float64), torch.randint(ways, (T, n))

    return one(5), one(6)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def check(model: nn.Module, support, query, *, steps: int = 2, adapted=None, **settings) -> dict[str, torch.Tensor]:
    """The program's gradients, compared with autodiff."""
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=steps, engine="program", parameters=adapted, **settings)
    _, gradients = maml.value_and_grad(fm.TaskBatch(support, query))
    truth = maml_loop(model, F.cross_entropy, support, query, 0.1, steps, adapted_names=adapted)[3]
    assert relative_error(gradients, truth) <= EXACT
    return gradients


def test_parameters_that_do_not_adapt_get_their_meta_gradient() -> None:
    support, query = sets(4)
    gradients = check(small(), support, query, adapted=["2.weight", "2.bias"])
    assert gradients["0.weight"].abs().max() > 0


def test_outer_parameters_in_norms_and_shared_subgraphs() -> None:
    """A learned scale that no task changes is used through a computation of its own, which runs once."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.randn(4))
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.norm(x * F.softplus(self.raw).square()))

    check(Scaled().double(), *sets(4), adapted=["head.weight", "head.bias"])


def test_patterns_and_predicates_choose_what_adapts() -> None:
    model = small()
    tasks = fm.TaskBatch(*sets(4))
    by_name = fm.MAML(model, F.cross_entropy, parameters=["2.*"]).value_and_grad(tasks)[1]
    by_rule = fm.MAML(model, F.cross_entropy, parameters=lambda n, p: n.startswith("2")).value_and_grad(tasks)[1]
    assert relative_error(by_name, by_rule) == 0
    with pytest.raises(ValueError, match=r"got \['nothing'\]"):
        fm.MAML(model, F.cross_entropy, parameters=["nothing"])


def test_frozen_parameters_neither_adapt_nor_get_a_gradient() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    gradients = check(model, *sets(4))
    assert "0.weight" not in gradients
    out = fm.MAML(model, F.cross_entropy, lr=0.1)(fm.TaskBatch(*sets(4)))
    out.loss.backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


def test_a_frozen_parameter_adapts_if_it_is_named() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    tasks = fm.TaskBatch(*sets(4))
    adapted = fm.MAML(model, F.cross_entropy, lr=0.1, parameters=["0.weight"]).adapt(tasks).parameters
    assert not torch.equal(adapted["0.weight"][0], model[0].weight)


def test_tied_parameters_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.outer = nn.Linear(4, 4)
            self.outer.weight = self.inner.weight

        def forward(self, x):
            return self.outer(torch.tanh(self.inner(x)))

    gradients = check(Tied().double(), *sets(4))
    assert set(gradients) == {"inner.weight", "inner.bias", "outer.bias"}


def test_one_module_used_twice() -> None:
    block = nn.Linear(4, 4)
    check(nn.Sequential(block, nn.Tanh(), block, nn.Tanh(), block).double(), *sets(4))


@pytest.mark.parametrize("normalise", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_modules(normalise) -> None:
    model = small()
    normalise(model[0])
    check(model, *sets(4))
    assert parametrize.is_parametrized(model[0], "weight")


def test_a_pruned_weight_stays_zero_through_the_inner_loop() -> None:
    model = small()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    model(torch.randn(1, 4).double())
    support, query = sets(4)
    gradients = check(model, support, query)
    pruned = model[0].weight_mask == 0
    assert gradients["0.weight_orig"][pruned].abs().max() == 0
    learner = fm.MAML(model, F.cross_entropy, lr=0.1, steps=3).adapt(fm.TaskBatch(support))
    assert torch.equal(learner.parameters["0.weight_orig"][:, pruned], model[0].weight_orig[pruned].expand(T, -1))
    adapted = learner.module(1)
    adapted(support[0][1])
    assert adapted[0].weight[pruned].abs().max() == 0
    assert type(model[0].weight) is torch.Tensor  # not one of the tracer's fake tensors


def test_buffers_are_read_and_never_written_by_default() -> None:
    model = CASES["conv4"].model()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double()
    before = copy.deepcopy(dict(model.named_buffers()))
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="program")
    tasks = fm.TaskBatch(*sets(1, 8, 8))
    maml(tasks).loss.backward()
    maml.value_and_grad(tasks)
    maml.adapt(tasks)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())


def test_running_statistics_end_as_a_loop_over_tasks_leaves_them() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Tanh(), nn.Linear(5, 3)).double()

    support, query = sets(4)
    ours, loop = build(), build()
    fm.MAML(ours, F.cross_entropy, lr=0.1, steps=2, update_running_stats=True, engine="program")(
        fm.TaskBatch(support, query)
    )
    for t in range(T):
        phi = dict(loop.named_parameters())
        for _ in range(2):
            out = torch.func.functional_call(loop, phi, (support[0][t],))
            g = torch.autograd.grad(F.cross_entropy(out, support[1][t]), list(phi.values()))
            phi = {n: p - 0.1 * d for (n, p), d in zip(phi.items(), g, strict=True)}
        torch.func.functional_call(loop, phi, (query[0][t],))
    assert relative_error(dict(ours.named_buffers()), dict(loop.named_buffers())) <= EXACT
    assert int(ours[1].num_batches_tracked) == 3 * T

    autodiff = build()
    fm.MAML(autodiff, F.cross_entropy, lr=0.1, steps=2, update_running_stats=True, engine="autodiff")(
        fm.TaskBatch(support, query)
    )
    assert relative_error(dict(autodiff.named_buffers()), dict(loop.named_buffers())) <= EXACT


def test_evaluation_mode_normalises_by_the_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 4).double())
    model.eval()
    check(model, *sets(4))


def test_the_mode_is_read_at_every_call() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1)
    tasks = fm.TaskBatch(*sets(4))
    training = maml(tasks).loss
    model.eval()
    assert not torch.equal(training, maml(tasks).loss)
    model.train()
    assert torch.equal(training, maml(tasks).loss)


def test_dropout_draws_a_mask_a_task_and_step_and_replays_it() -> None:
    """With the masks it drew taken as fixed, the meta-gradient is the derivative of the loss it reported."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)).double()
    support, query = sets(4)
    support = tuple(x[:1].expand(T, *x.shape[1:]) for x in support)
    query = tuple(x[:1].expand(T, *x.shape[1:]) for x in query)
    maml = fm.MAML(model, F.cross_entropy, lr=0.5, steps=2, engine="program")
    tasks = fm.TaskBatch(support, query)

    def value() -> torch.Tensor:
        torch.manual_seed(3)  # the same masks again
        return maml(tasks).loss

    out = value()
    torch.manual_seed(3)
    assert maml(tasks).task_losses.unique().numel() == T  # equal tasks, different masks
    out.backward()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    slope = sum((p.grad * direction[n]).sum() for n, p in model.named_parameters())
    h = 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p += sign * h * direction[n]
            losses.append(value())
            for n, p in model.named_parameters():
                p -= sign * h * direction[n]
    # a central difference is good to h^2 + eps / h, relative to a slope of order one
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(float(slope), rel=1e-6, abs=1e-7)


def test_a_loss_with_parameters_of_its_own() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(1.7).double())

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs / self.temperature, targets)

    model, loss = small(), Tempered()
    tasks = fm.TaskBatch(*sets(4))
    program = fm.MAML(model, loss, lr=0.1, steps=2, engine="program")
    autodiff = fm.MAML(model, loss, lr=0.1, steps=2, engine="autodiff")
    gradients = program.value_and_grad(tasks)[1]
    assert relative_error(gradients, autodiff.value_and_grad(tasks)[1]) <= EXACT
    assert gradients["loss.temperature"].abs() > 0
    assert "loss.temperature" in dict(program.named_parameters())


def test_unused_parameters_raise_or_stay() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.spare = nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    model = Spare().double()
    tasks = fm.TaskBatch(*sets(4))
    for engine in ("program", "autodiff"):
        with pytest.raises(ValueError, match=r"spare\.weight.*allow_unused"):
            fm.MAML(model, F.cross_entropy, engine=engine)(tasks)
        maml = fm.MAML(model, F.cross_entropy, engine=engine, allow_unused=True)
        assert maml.value_and_grad(tasks)[1]["spare.weight"].abs().max() == 0
        assert torch.equal(maml.adapt(tasks).parameters["spare.weight"][0], model.spare.weight)

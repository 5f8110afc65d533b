"""The estimator: what a fit trains, what comes of it, and its manners."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn
from torch.nn.utils import prune

import fastmeta as fm
from fastmeta.learner.estimator import MetaLearner
from fastmeta.learner.metric import Metric
from fastmeta.tasks import Sinusoid, TaskSet


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


AUTODIFF = {"engine": "autodiff"}  # spares small tests the time of tracing


def small(model: nn.Module | None = None, **changes: Any) -> MetaLearner:
    settings = {"loss": "mse_loss", "inner_lr": 0.05, "meta_lr": 1e-2, "options": AUTODIFF}
    settings |= {"random_state": 0, "verbose": False}
    return MetaLearner(network() if model is None else model, **settings | changes)


def weights(learner: MetaLearner) -> list[Tensor]:
    return [p.detach() for p in learner.learner_.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def by_hand(model: nn.Module, batches: list[fm.TaskBatch], optimizer: Any, inner_lr: float) -> None:
    """What a fit is to do, by plain autograd: one inner step on each task, mean query loss, the optimizer."""
    for tasks in batches:
        losses = []
        for t in range(len(tasks)):
            (xs, ys), (xq, yq) = tasks.task(t)
            theta = dict(model.named_parameters())
            inner = F.mse_loss(torch.func.functional_call(model, theta, xs), ys)
            d = torch.autograd.grad(inner, list(theta.values()), create_graph=True)
            phi = {n: p - inner_lr * g for (n, p), g in zip(theta.items(), d, strict=True)}
            losses.append(F.mse_loss(torch.func.functional_call(model, phi, xq), yq))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("Adam", 1e-2), (functools.partial(torch.optim.SGD, momentum=0.9, lr=0.05), None)]
)
def test_a_fit_is_the_loop_that_one_would_write(optimizer: Any, lr: float | None) -> None:
    stream, model = Sinusoid(3, 4, seed=1, dtype=torch.float64), network().double()
    batches = [stream.sample() for _ in range(6)]
    learner = small(model, optimizer=optimizer, meta_lr=lr, options={"engine": "program"})
    assert learner.fit(Sinusoid(3, 4, seed=1, dtype=torch.float64), epochs=2, steps_per_epoch=3) is learner
    truth = copy.deepcopy(model)
    made = torch.optim.Adam(truth.parameters(), lr=1e-2) if lr else optimizer(truth.parameters())
    by_hand(truth, batches, made, 0.05)
    for p, q in zip(learner.model_.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
    assert same(list(model.parameters()), list(network().double().parameters()))  # the model given stays as it is
    assert [r["epoch"] for r in learner.history_] == [1, 2]
    assert learner.n_steps_ == 6


def test_an_epoch_is_a_pass_over_tasks_that_have_an_end() -> None:
    drawn = Sinusoid(1, 4, seed=3)
    tasks = [drawn.sample().task(0) for _ in range(5)]
    learner = small().fit(tasks, epochs=2, tasks_per_step=2)
    assert [r["step"] for r in learner.history_] == [3, 6]
    assert same(weights(learner), weights(small().fit(TaskSet(tasks, 2, seed=0), epochs=2)))
    batch = fm.TaskBatch.stack(tasks)
    one = small().fit(batch, epochs=3)
    assert same(weights(one), weights(small().fit([batch], epochs=3)))
    assert one.n_steps_ == 3
    loader = torch.utils.data.DataLoader(tasks, batch_size=2, shuffle=True, collate_fn=fm.TaskBatch.stack)
    assert [r["step"] for r in small().fit(loader, epochs=2).history_] == [3, 6]
    with pytest.raises(TypeError, match=r"fit: tasks must be a TaskSampler, .* got generator"):
        small().fit(x for x in tasks)
    with pytest.raises(TypeError, match=r"collate_fn=TaskBatch\.stack"):
        small().fit(torch.utils.data.DataLoader(tasks, batch_size=1))
    with pytest.raises(TypeError, match="validation must be tasks that can be gone through again"):
        small().fit(tasks, validation=iter([batch]))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 4)])
def test_accumulated_batches_are_one_of_all_their_tasks(sizes: tuple[int, ...]) -> None:
    drawn = Sinusoid(1, 4, seed=3, dtype=torch.float64)
    tasks = [drawn.sample().task(0) for _ in range(2 * sum(sizes))]
    ends = np.cumsum((0, *sizes, *sizes))
    parts = [fm.TaskBatch.stack(tasks[start:end]) for start, end in itertools.pairwise(ends)]
    halves = [fm.TaskBatch.stack(tasks[: len(tasks) // 2]), fm.TaskBatch.stack(tasks[len(tasks) // 2 :])]
    settings = {"model": network().double(), "options": {"engine": "program"}, "inner_steps": 2, "metric": "mse"}
    accumulated = small(**settings, accumulate=len(sizes)).fit(parts, epochs=2)
    whole = small(**settings).fit(halves, epochs=2)
    assert accumulated.n_steps_ == whole.n_steps_ == 4
    for p, q in zip(weights(accumulated), weights(whole), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(accumulated.history_, whole.history_, strict=True):
        assert [ours[n] for n in ("loss", "mse")] == pytest.approx([theirs[n] for n in ("loss", "mse")], rel=1e-9)
    assert not same(weights(whole), weights(small(**settings).fit(parts, epochs=2)))


def test_a_pass_with_too_few_batches_for_a_meta_step_goes_on_in_the_next() -> None:
    drawn = Sinusoid(1, 4, seed=3)
    tasks = [drawn.sample().task(0) for _ in range(7)]
    batches = [fm.TaskBatch.stack(tasks[start : start + 2]) for start in range(0, 7, 2)]
    assert [r["step"] for r in small(accumulate=3).fit(batches, epochs=2).history_] == [2, 4]
    assert [r["step"] for r in small(accumulate=2).fit(tasks, epochs=2, tasks_per_step=2).history_] == [2, 4]
    for wrong, error in ((0, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="MetaLearner: accumulate must be"):
            small(accumulate=wrong).fit(tasks)


def test_unequal_tasks_are_weighted() -> None:
    drawn = [Sinusoid(1, n, seed=n).sample().task(0) for n in (3, 5, 4, 6)]
    learner = small(metric="mse").fit(drawn, epochs=1, tasks_per_step=4)
    found = learner.evaluate(drawn, batch=4)
    apart = [F.mse_loss(learner.predict(xq, s), yq) for s, (xq, yq) in drawn]
    assert found.after.mean == pytest.approx(float(torch.stack(apart).mean()), rel=1e-5)
    assert found.loss == pytest.approx(found.after.mean, rel=1e-5)


def test_the_same_seed_gives_the_same_weights() -> None:
    model = network(0.3)

    def fitted(seed: int | None) -> MetaLearner:
        return small(model, random_state=seed).fit(Sinusoid(3, 4), epochs=1, steps_per_epoch=4)

    before = torch.get_rng_state()
    one, two, other = fitted(7), fitted(7), fitted(8)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))
    torch.manual_seed(7)
    assert not same(weights(fitted(None)), weights(fitted(None)))  # the generator goes on
    again = one.fit(Sinusoid(3, 4), epochs=1, steps_per_epoch=4)
    assert same(weights(again), weights(two))  # a fit begins anew


def test_a_warm_start_goes_on() -> None:
    learner = small(warm_start=True).fit(Sinusoid(3, 4), steps_per_epoch=2)
    first = [w.clone() for w in weights(learner)]
    model = small(copy.deepcopy(learner.model_)).fit(Sinusoid(3, 4), steps_per_epoch=2)
    assert same(weights(learner.fit(Sinusoid(3, 4), steps_per_epoch=2)), weights(model))
    assert not same(weights(learner), first)


ALGORITHMS = {
    "name": {"algorithm": "ANIL", "inner_steps": 2},
    "class": {"algorithm": fm.MetaSGD},
    "options": {"algorithm": "cavia", "options": {"context": 2} | AUTODIFF},
    "function": {"algorithm": functools.partial(fm.MAMLPlusPlus, multi_step_epochs=2), "inner_steps": 2},
    "reptile": {"algorithm": "reptile", "inner_steps": 2},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_by_name_class_or_function(name: str) -> None:
    model = nn.Linear(3, 1) if name == "options" else network()
    learner = small(model, **ALGORITHMS[name]).fit(Sinusoid(3, 4), epochs=3, steps_per_epoch=2)
    support, query = Sinusoid(1, 4, seed=5).sample().task(0)
    out = learner.predict(query[0], support)
    assert out.shape == (4, 1)
    assert not torch.equal(out, learner.predict(query[0], support, steps=1 if name == "function" else 0))
    if name == "function":
        assert learner.learner_.epoch == 2


def test_an_instance_is_copied_and_has_its_own_settings() -> None:
    instance = fm.ANIL(network(), F.mse_loss, lr=0.05, steps=2, **AUTODIFF)
    before = [p.detach().clone() for p in instance.parameters()]
    learner = MetaLearner(algorithm=instance, meta_lr=1e-2, random_state=0, verbose=False)
    learner.fit(Sinusoid(3, 4), steps_per_epoch=3)
    named = small(algorithm="anil", inner_steps=2).fit(Sinusoid(3, 4), steps_per_epoch=3)
    assert same(weights(learner), weights(named))
    assert same(list(instance.parameters()), before)
    MetaLearner(instance.model, instance, verbose=False).fit(Sinusoid(3, 4), steps_per_epoch=1)
    with pytest.raises(ValueError, match="model must be None or the instance's own"):
        MetaLearner(network(), instance, verbose=False).fit(Sinusoid(3, 4))
    with pytest.raises(ValueError, match=r"a class where \['loss', 'lr'\] are given"):
        MetaLearner(None, instance, F.mse_loss, inner_lr=0.1, verbose=False).fit(Sinusoid(3, 4))


def test_a_learner_that_has_run_is_copied_without_what_it_remembers() -> None:
    maml, tasks = fm.MAML(network(), F.mse_loss, lr=0.05), Sinusoid(3, 4).sample()
    maml(tasks).loss.backward()
    twin = copy.deepcopy(maml)
    loss, gradients = twin.value_and_grad(tasks)
    assert torch.equal(loss, maml.value_and_grad(tasks)[0])
    assert all(torch.equal(gradients[n], p.grad) for n, p in maml.model.named_parameters())
    with torch.no_grad():
        twin.model[0].weight.add_(1)
    assert not torch.equal(maml.model[0].weight, twin.model[0].weight)


def test_dropout_is_on_in_training_alone_and_a_model_in_evaluation_mode_stays_so() -> None:
    support, query = Sinusoid(1, 4, seed=5).sample().task(0)
    learner = small(network(0.5)).fit(Sinusoid(3, 4), steps_per_epoch=2)
    assert not learner.model_[2].training
    assert torch.equal(learner.predict(query[0], support), learner.predict(query[0], support))
    adapted = learner.adapt(support)
    assert torch.equal(learner.predict(query[0], adapted=adapted), adapted(query[0]))
    still = small(network(0.5).eval()).fit(Sinusoid(3, 4), steps_per_epoch=2)
    assert same(weights(still), weights(small(network(0.0)).fit(Sinusoid(3, 4), steps_per_epoch=2)))
    assert not same(weights(still), weights(learner))


@pytest.mark.parametrize("followed", [False, True])
def test_batch_norm_normalises_as_it_was_trained_to(followed: bool) -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    options = {"update_running_stats": followed} | AUTODIFF
    learner = small(model, options=options).fit(Sinusoid(3, 4), steps_per_epoch=2)
    assert learner.model_[1].training is not followed
    assert bool((learner.model_[1].running_mean != 0).any()) is followed


def test_a_pruned_model_goes_in_as_it_is() -> None:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(torch.zeros(2, 1))  # leaves the masked weight behind, a result of autograd
    learner = small(model).fit(Sinusoid(3, 4), steps_per_epoch=2)
    mask = model[0].weight_mask
    assert int((mask == 0).sum()) == 4
    adapted = learner.adapt(Sinusoid(1, 4, seed=5).sample().task(0)[0]).module()
    adapted(torch.zeros(2, 1))
    assert bool((adapted[0].weight[mask == 0] == 0).all())


def test_rates_of_the_outer_loop_follow_a_schedule() -> None:
    def rates(each: str, make: Any, **more: Any) -> list[float]:
        learner = small(scheduler=make, schedule=each, meta_lr=1.0, **more)
        learner.fit(Sinusoid(2, 4), epochs=3, steps_per_epoch=2)
        return [r["meta_lr"] for r in learner.history_]

    halves = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    assert rates("epoch", halves) == [1.0, 0.5, 0.25]
    assert rates("step", halves) == [0.25, 0.0625, 0.015625]
    plateau = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=1e9, mode="max")
    assert rates("epoch", plateau, optimizer="SGD", clip_norm=1e-3) == [1.0, 1.0, 0.1]
    with pytest.raises(ValueError, match="schedule must be one of 'epoch', 'step', got 'day'"):
        rates("day", halves)


def test_training_learns_and_is_judged_the_same_way_every_epoch() -> None:
    validation = Sinusoid(1, 10, 20, seed=9)
    learner = small(metric="mse", inner_steps=1, eval_steps=3, inner_lr=0.02, options={"engine": "program"})
    learner.fit(Sinusoid(10, 10, seed=1), epochs=2, steps_per_epoch=80, validation=validation, validation_tasks=40)
    first, last = learner.history_
    assert last["validation"] < last["validation_before"]
    assert last["validation"] < first["validation"]
    found = learner.evaluate(validation, number=40)
    assert (found.after.mean, found.before.mean) == (last["validation"], last["validation_before"])
    assert found.steps == 3
    tasks = fm.TaskBatch.stack([validation.sample(1).task(0) for _ in range(3)])
    apart = [F.mse_loss(learner.predict(xq, s), yq) for s, (xq, yq) in (tasks.task(t) for t in range(3))]
    assert learner.evaluate(tasks).after.mean == pytest.approx(float(torch.stack(apart).mean()), rel=1e-5)


def test_predictions_take_arrays_and_batches() -> None:
    learner = small().fit(Sinusoid(3, 4), steps_per_epoch=1)
    tasks = Sinusoid(3, 4, seed=5).sample()
    every = learner.predict(tasks.query[0], tasks)
    for t in range(3):
        (xs, ys), (xq, _) = tasks.task(t)
        as_arrays = learner.predict(xq.double().numpy(), (xs.double().numpy(), ys.double().numpy()))
        assert torch.allclose(every[t], as_arrays, atol=1e-6)
        assert not as_arrays.requires_grad
    with pytest.raises(TypeError, match="support or adapted must be given, one of them, got neither"):
        learner.predict(tasks.query[0])
    with pytest.raises(TypeError, match="got both"):
        learner.predict(tasks.query[0], tasks, adapted=learner.adapt(tasks))


def test_manners_of_scikit_learn() -> None:
    learner = small(options={"allow_unused": True} | AUTODIFF)
    parameters = learner.get_params()
    assert parameters["inner_lr"] == 0.05
    assert all(getattr(learner, name) is value for name, value in parameters.items())
    learner.set_params(inner_steps=3)
    with pytest.raises(ValueError, match="Invalid parameter"):
        learner.set_params(steps=3)
    support, query = Sinusoid(1, 4).sample().task(0)
    for call in (
        lambda: learner.adapt(support),
        lambda: learner.predict(query[0], support),
        lambda: learner.evaluate([]),
        lambda: learner.recommend(support, query[0]),
        lambda: learner.save("nowhere"),
    ):
        with pytest.raises(NotFittedError, match="fit or load must come before"):
            call()
    learner.fit(Sinusoid(3, 4), steps_per_epoch=2)
    fresh = clone(learner)
    assert not hasattr(fresh, "learner_")
    assert fresh.model is not learner.model
    assert same(weights(fresh.fit(Sinusoid(3, 4), steps_per_epoch=2)), weights(learner))
    assert "inner_steps=3" in repr(fresh)
    instance = fm.MAML(network(), F.mse_loss, **AUTODIFF)
    clone(MetaLearner(algorithm=instance, verbose=False)).fit(Sinusoid(3, 4), steps_per_epoch=1)


@pytest.mark.parametrize(
    ("changes", "fit", "error", "message"),
    [
        ({"algorithm": "mamml"}, {}, ValueError, "algorithm must be one of"),
        ({"algorithm": 3}, {}, TypeError, "a name, a class or an instance"),
        ({"algorithm": lambda *_, **__: 3}, {}, TypeError, "what makes an algorithm of fastmeta, got int"),
        ({"loss": "mse"}, {}, ValueError, "loss must be one of"),
        ({"loss": None}, {}, TypeError, "loss must be a callable or a name"),
        ({"optimizer": "Adams"}, {}, ValueError, "optimizer must be a name of torch.optim"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, {}, TypeError, "a fit trains a copy"),
        ({"optimizer": list}, {"lr": None}, TypeError, "must make a torch.optim.Optimizer, got list"),
        ({"metric": "f1"}, {}, ValueError, "metric: name must be one of"),
        ({"random_state": -1}, {}, ValueError, "random_state must be at least 0"),
        ({}, {"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({}, {"steps_per_epoch": 1.5}, TypeError, "steps_per_epoch must be an integer"),
        ({}, {"tasks": fm.TaskBatch((torch.zeros(2, 3, 1), torch.zeros(2, 3, 1)))}, ValueError, "query"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_explained(changes: dict, fit: dict, error: type[Exception], message: str) -> None:
    changes = {"meta_lr": fit.pop("lr")} | changes if "lr" in fit else changes
    learner = small(**changes)
    with pytest.raises(error, match=message):
        learner.fit(**{"tasks": Sinusoid(2, 4), "steps_per_epoch": 1} | fit)
    assert not hasattr(learner, "learner_") or message == "query"
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        MetaLearner(None, "maml", "mse_loss", verbose=False).fit(Sinusoid(2, 4))


def test_a_loss_that_is_not_finite_stops_the_fit_and_leaves_finite_weights() -> None:
    learner = small(inner_lr=1e30)
    with pytest.raises(ValueError, match=r"loss must be finite, got .*lower the inner rate"):
        learner.fit(Sinusoid(3, 4))
    assert all(torch.isfinite(w).all() for w in weights(learner))


def test_a_metric_of_ones_own() -> None:
    worst = Metric("worst", lambda out, query: (out.logits - query[1]).abs().flatten(1).amax(1), larger=False)
    learner = small(metric=worst).fit(Sinusoid(3, 4), steps_per_epoch=2)
    tasks = Sinusoid(3, 4, seed=2).sample()
    apart = (learner.predict(tasks.query[0], tasks) - tasks.query[1]).abs().flatten(1).amax(1)
    assert learner.evaluate(tasks).after.mean == pytest.approx(float(apart.mean()))
    assert "worst" in learner.history_[0]


class Ranker(nn.Module):
    """Scores items by two numbers, ``[N]``; the user's own are in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, items: Tensor) -> Tensor:
        return self.layer(items).squeeze(-1)


def test_recommendations_are_the_best_items_for_the_user() -> None:
    items, tastes = torch.randn(20, 2), torch.randn(5, 2)
    rated = torch.arange(6).expand(5, -1)
    users = fm.TaskBatch((items[rated], (items[rated] * tastes[:, None]).sum(-1)))
    learner = MetaLearner(Ranker(), "maml", "mse_loss", inner_lr=0.1, inner_steps=20, verbose=False)
    learner.set_params(optimizer="SGD", options=AUTODIFF).fit(fm.TaskBatch(users.support, users.support))
    many = learner.recommend(users, items, 4)
    assert many.items.shape == many.scores.shape == (5, 4)
    for t in range(5):
        support, _ = users.task(t)
        scores = learner.predict(items, support)
        assert many.items[t].tolist() == scores.argsort(descending=True)[:4].tolist()
        one = learner.recommend(support, items.numpy(), 4, exclude=rated[t])
        allowed = [i for i in scores.argsort(descending=True).tolist() if i >= 6][:4]
        assert one.items.tolist() == allowed
        assert torch.allclose(one.scores, scores[allowed], atol=1e-6)
        truth = (items * tastes[t]).sum(1)
        assert float(truth[one.items].mean()) > float(truth[6:].mean())
    apart = learner.recommend(users, items, 3, exclude=[[], [0], [1, 2], np.arange(17), []])
    assert sorted(apart.items[3].tolist()) == [17, 18, 19]
    for exclude, k, message in [
        (rated[0], 15, "at most the 14 items that are left, got 15"),
        ([20], 1, "numbers below 20, and not negative"),
        ([0.5], 1, "numbers of items"),
        (None, 21, "at most the 20 items"),
    ]:
        with pytest.raises(ValueError, match=message):
            learner.recommend(users.task(0)[0], items, k, exclude=exclude)
    with pytest.raises(ValueError, match="5 sequences, one a user, got 2"):
        learner.recommend(users, items, 1, exclude=[[], []])
    wide = small(nn.Linear(2, 3))
    wide.fit(fm.TaskBatch((torch.zeros(2, 3, 2), torch.zeros(2, 3, 3)), (torch.zeros(2, 3, 2), torch.zeros(2, 3, 3))))
    with pytest.raises(ValueError, match=r"one score an item, \[N\] or \[N, 1\], got \[20, 3\]"):
        wide.recommend((torch.zeros(3, 2), torch.zeros(3, 3)), items, 1)

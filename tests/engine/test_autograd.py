"""To everything in PyTorch that works on gradients, a meta-step is one ordinary function."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.engine import function
from tests.engine.cases import T
from tests.oracle import relative_error


def build() -> tuple[nn.Module, fm.TaskBatch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    sets = ((torch.randn(T, n, 4, dtype=torch.float64), torch.randint(3, (T, n))) for n in (5, 6))
    return model, fm.TaskBatch(*sets)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters()}


def test_gradients_accumulate_and_scale() -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    truth = maml.value_and_grad(tasks)[1]
    (maml(tasks).loss * 1024).backward()
    maml(tasks).loss.backward()
    assert relative_error({n: g / 1025 for n, g in grads(model).items()}, truth) <= 1e-12


def test_parameter_hooks_and_clipping_see_the_meta_gradient() -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    truth = maml.value_and_grad(tasks)[1]
    seen = {}
    for n, p in model.named_parameters():
        p.register_hook(lambda g, n=n: seen.__setitem__(n, g.clone()))
    maml(tasks).loss.backward()
    assert relative_error(seen, truth) <= 1e-12
    norm = torch.stack([g.norm() for g in truth.values()]).norm()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3) == pytest.approx(float(norm))


def test_an_optimizer_lowers_the_meta_loss() -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    optimizer = torch.optim.Adam(maml.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = maml(tasks).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_retaining_the_graph_and_a_second_backward() -> None:
    model, tasks = build()
    out = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)(tasks)
    out.loss.backward(retain_graph=True)
    once = {n: g.clone() for n, g in grads(model).items()}
    out.loss.backward()
    assert relative_error(grads(model), {n: 2 * g for n, g in once.items()}) <= 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


@pytest.mark.parametrize("executor", ["native", "reference"])
def test_rates_that_no_step_uses_get_zero(executor: str) -> None:
    model, tasks = build()
    for lr in (
        nn.Parameter(torch.tensor(0.1)),
        {n: nn.Parameter(torch.tensor(0.1)) for n, _ in model.named_parameters()},
    ):
        maml = fm.MAML(model, F.cross_entropy, lr=lr, steps=0, executor=executor)
        rates = {n: g for n, g in maml.value_and_grad(tasks)[1].items() if n.startswith("lr")}
        assert rates
        assert all(float(g) == 0 for g in rates.values())


def test_saved_tensor_hooks_see_what_is_kept() -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.numel()) or t.numpy(), torch.from_numpy):
        loss = maml(tasks).loss
    loss.backward()
    assert packed
    assert relative_error(grads(model), maml.value_and_grad(tasks)[1]) <= 1e-12


def test_changing_a_parameter_before_backward_raises() -> None:
    model, tasks = build()
    loss = fm.MAML(model, F.cross_entropy, lr=0.1)(tasks).loss
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_is_kept_without_gradients_or_after_backward() -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=3)
    with torch.no_grad():
        assert not maml(tasks).loss.requires_grad
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(weakref.ref(t)) or t, lambda t: t):
        out = maml(tasks)
    assert out.loss.grad_fn.gradient is not None  # computed on the way
    out.loss.backward()
    gc.collect()
    assert out.loss.grad_fn.gradient is None  # given away
    owned = [*model.parameters(), *tasks.support, *tasks.query]
    alive = [r() for r in kept if r() is not None]
    assert alive
    assert all(t.numel() == 1 or any(t.data_ptr() == o.data_ptr() for o in owned) for t in alive)  # 1: the inner rate


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    asked = []
    real = function.evaluate

    def evaluate(work, programs, cotangents, **options):
        asked.append(cotangents is not None)
        return real(work, programs, cotangents, **options)

    monkeypatch.setattr(function, "evaluate", evaluate)
    with torch.no_grad():
        value = maml(tasks).loss
    assert value == maml(tasks).loss
    assert asked == [False, True]


def objectives() -> dict[str, Callable[[fm.MetaOutput], torch.Tensor]]:
    return {
        "one task": lambda out: out.task_losses[1],
        "weighted tasks": lambda out: (out.task_losses * torch.arange(1, T + 1)).sum() + 3 * out.loss,
        "outputs": lambda out: out.logits.square().mean(),
        "all": lambda out: out.loss + out.task_losses.square().sum() + out.logits.tanh().sum(),
    }


@pytest.mark.parametrize("name", list(objectives()))
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_other_objectives_than_the_mean_loss(name: str, chunk_size: int | None) -> None:
    model, tasks = build()
    objective = objectives()[name]
    oracle = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="autodiff")
    parameters = list(model.parameters())
    truth = dict(zip(grads(model), torch.autograd.grad(objective(oracle(tasks)), parameters), strict=True))
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="program", chunk_size=chunk_size)
    for turn in range(2):  # the first time the forward pass expects the mean loss, the second time it does not
        found = torch.autograd.grad(objective(maml(tasks)), parameters)
        assert relative_error(dict(zip(truth, found, strict=True)), truth) <= 1e-12, turn
    mean = torch.autograd.grad(maml(tasks).loss, parameters)
    assert relative_error(dict(zip(truth, mean, strict=True)), maml.value_and_grad(tasks)[1]) <= 1e-12


def test_another_objective_sees_the_same_dropout_and_the_same_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    _, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, update_running_stats=True)
    state, buffers = torch.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
    maml(tasks).loss.backward()
    mean = grads(model)
    after = torch.get_rng_state()
    model.zero_grad()
    model.load_state_dict(buffers, strict=False)
    torch.set_rng_state(state)
    out = maml(tasks)
    model(tasks.query[0][0])  # draws, and moves the running statistics
    drawn = torch.get_rng_state()
    out.task_losses.mean().backward()
    assert relative_error(grads(model), mean) <= 1e-12
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.equal(after, drawn)


def test_the_same_numbers_every_time() -> None:
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=3)
    first, second = maml.value_and_grad(tasks)[1], maml.value_and_grad(tasks)[1]
    assert all(torch.equal(first[n], second[n]) for n in first)


def _worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    model, tasks = build()
    wide = fm.TaskBatch(*(tuple(torch.cat([x, x.flip(0)])[:4] for x in s) for s in (tasks.support, tasks.query)))
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    parallel = nn.parallel.DistributedDataParallel(maml)
    parallel(wide[2 * rank : 2 * rank + 2]).loss.backward()
    if rank == 0:
        truth = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2).value_and_grad(wide)[1]
        torch.save((grads(model), truth), folder / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel_averages_over_processes(tmp_path: Path) -> None:
    mp.spawn(_worker, (tmp_path,), nprocs=2)  # until both have ended, or one has failed
    found, truth = torch.load(tmp_path / "gradients.pt")
    assert relative_error(found, truth) <= 1e-12

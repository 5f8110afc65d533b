"""Tasks run in chunks of any size: the same numbers, and in ``value_and_grad`` one chunk's memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmeta as fm
from fastmeta.engine import meta_step
from fastmeta.engine.capture import Captures
from fastmeta.engine.compiler import Programs, Room
from fastmeta.engine.native_passes import NativePasses
from tests.oracle import relative_error

pytestmark = pytest.mark.usefixtures("traced_once")
T = 5


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    sets = [(torch.randn(T, n, 4, dtype=torch.float64), torch.randint(3, (T, n))) for n in (5, 6)]
    return model, fm.TaskBatch(*sets)


def settings(chunk_size):
    rate = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    common = {"lr": rate, "steps": 2, "parameters": ["3.*"], "update_running_stats": True, "engine": "program"}
    return {**common, "chunk_size": chunk_size}


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 99])
def test_every_chunk_size_gives_the_same_numbers(chunk_size) -> None:
    model, tasks = build()
    whole = fm.MAML(model, F.cross_entropy, **settings(T))
    loss, truth = whole.value_and_grad(tasks)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    logits, adapted = whole(tasks).logits.detach(), whole.adapt(tasks).parameters

    model, tasks = build()
    cut = fm.MAML(model, F.cross_entropy, **settings(chunk_size))
    value, gradients = cut.value_and_grad(tasks)
    # float64 sums in another order
    assert relative_error(gradients, truth) <= 1e-12
    assert relative_error(value, loss) <= 1e-12
    assert relative_error(dict(model.named_buffers()), buffers) <= 1e-12
    out = cut(tasks)
    out.loss.backward()
    assert (
        relative_error(
            {n: p.grad for n, p in model.named_parameters()}, {n: truth[n] for n in dict(model.named_parameters())}
        )
        <= 1e-12
    )
    assert relative_error(cut.lr.grad, truth["lr"]) <= 1e-12
    assert relative_error(out.logits.detach(), logits) <= 1e-12
    assert out.support_losses.shape == (2, T)
    assert relative_error(cut.adapt(tasks).parameters, adapted) <= 1e-12


def test_chunks_cover_the_tasks_evenly() -> None:
    for tasks in range(1, 12):
        for size in range(1, 13):
            programs = Programs(None, None, size, Captures(), Room(), NativePasses(None, None))
            lengths = [c.stop - c.start for c in programs.chunks(tasks)]
            assert sum(lengths) == tasks
            assert max(lengths) <= size
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_chunk_sizes_that_are_none(size, kind) -> None:
    with pytest.raises(kind, match="chunk_size must be"):
        fm.MAML(nn.Linear(1, 1), F.mse_loss, chunk_size=size)


def test_where_memory_runs_out_fewer_tasks_run_at_a_time(monkeypatch) -> None:
    model, tasks = build()
    _, truth = fm.MAML(model, F.cross_entropy, executor="reference", **settings(T)).value_and_grad(tasks)
    model, tasks = build()
    maml = fm.MAML(model, F.cross_entropy, executor="reference", **settings(None))
    sizes, fits = [], 2
    unroll = meta_step.unroll

    def scarce(work, *args, **kwargs):
        sizes.append(work.tasks)
        if work.tasks > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unroll(work, *args, **kwargs)

    monkeypatch.setattr(meta_step, "unroll", scarce)
    with pytest.warns(UserWarning, match="5 tasks at a time do not fit .* chunk_size=2 asks for that at once"):
        _, gradients = maml.value_and_grad(tasks)
    assert relative_error(gradients, truth) <= 1e-12  # float64 sums in another order
    assert sizes == [5, 1, 2, 2]
    sizes.clear()
    maml.value_and_grad(tasks)
    assert sizes == [1, 2, 2]
    fits = 0
    with pytest.warns(UserWarning, match="2 tasks at a time"), pytest.raises(torch.OutOfMemoryError):
        maml.value_and_grad(tasks)

"""The resident executor: which programs it takes, and on a GPU that it gives what the reference and autodiff give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from fastmeta.engine import resident
from fastmeta.engine.callback import Failures
from fastmeta.engine.lower import NotLowered, lower
from fastmeta.engine.resident import ResidentStep, chain_of
from tests.conftest import lack
from tests.kernels import resident_shim
from tests.oracle import maml_loop, relative_error

FLOAT64_BOUND = 1e-9  # docs/maths.md, section 6
T, N, NQ = 5, 6, 4


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """A chain of linear layers."""
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*parts[:-1])


def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=1)


def summed(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="sum")


def tasks_for(loss: Any, fan_in: int, out: int, dtype: torch.dtype, device: str, tasks: int = T) -> fm.TaskBatch:
    """Random tasks."""

    def batch(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, n, fan_in, dtype=torch.float64)
        if loss in (F.cross_entropy, ignoring):
            labels = torch.randint(out, (tasks, n))
            labels[:, 0] = 0  # one that counts
            return x.to(dtype).to(device), labels.to(device)
        y = torch.rand(tasks, n, out, dtype=torch.float64)
        return x.to(dtype).to(device), y.to(dtype).to(device)

    return fm.TaskBatch(support=batch(N), query=batch(NQ))


def program_of(model: nn.Module, loss: Any, fan_in: int, out: int, **options: Any) -> Any:
    """The lowered support program, and the rest of what it came from."""
    maml = fm.MAML(model, loss, lr=0.1, steps=1, **options)
    maml.explain(tasks_for(loss, fan_in, out, torch.float32, "cpu"))
    compiler = maml._memory.compiler
    return next(iter(compiler._programs.values()))


def chain(model: nn.Module, loss: Any, fan_in: int, out: int) -> Any:
    program = program_of(model, loss, fan_in, out)
    return chain_of(lower(program, program.outer, Failures()))


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return h + self.second(h)


class Flattening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1))


def test_a_chain() -> None:
    found = chain(mlp(3, 5, 2, activation=nn.ReLU), F.cross_entropy, 3, 2)
    assert found.layers == ((3, 5, "relu", 0.0, 0, 1), (5, 2, "identity", 0.0, 2, 3))
    assert found.loss == ("cross_entropy", True, -100, N)
    assert found.data == (0, 1)
    assert chain(Flattening(), F.mse_loss, 4, 2).layers[0][:2] == (4, 5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), "got norm"),
        (Skipping, "got pointwise"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Tanh(), nn.Linear(4, 2)), "got pointwise"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)), "has no native kernel"),
        (lambda: mlp(*([3] * 26)), "at most 24 layers, got 25"),
    ],
)
def test_what_is_no_chain_is_refused(model: Callable[[], nn.Module], reason: str) -> None:
    out = 3 if model is Skipping or reason.startswith("at most") else 2
    with pytest.raises(NotLowered, match=reason):
        chain(model(), F.mse_loss, 3, out)


def test_without_cuda_kernels_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(mlp(3, 2), F.mse_loss, 3, 2)
    monkeypatch.setattr(native, "_load_cuda", lambda: (None, "there is no CUDA device"))
    with pytest.raises(NotLowered, match="there is no CUDA device"):
        ResidentStep(program, program)


def test_work_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(mlp(3, 2), F.mse_loss, 3, 2)
    monkeypatch.setattr(native, "_load_cuda", lambda: (SimpleNamespace(Resident32=None, Resident64=None), ""))
    step = ResidentStep(program, program)
    cpu = torch.zeros(1, 1)
    work: Any = SimpleNamespace(alpha=cpu, parameters={"w": cpu}, support=(cpu, cpu), query=(cpu, cpu), memory={})
    assert step.refusal(work, outputs=False) == "tensors must be on one CUDA device, got cpu"
    assert step.call(work, None, learned=False, outputs=False) == "tensors must be on one CUDA device, got cpu"


# On a GPU, and on a CPU by tests/csrc/cuda_shim.h.


CASES: dict[str, tuple[Callable[[], nn.Module], Any, int, int]] = {
    "sinusoid": (lambda: mlp(1, 40, 40, 1, activation=nn.ReLU), F.mse_loss, 1, 1),
    "tanh": (lambda: mlp(1, 64, 64, 1), F.mse_loss, 1, 1),
    "gelu classes": (lambda: mlp(7, 33, 20, 5, activation=nn.GELU), F.cross_entropy, 7, 5),
    "ignored": (lambda: mlp(3, 9, 4, activation=nn.SiLU, bias=False), ignoring, 3, 4),
    "binary": (lambda: mlp(4, 6, 3, activation=nn.LeakyReLU), F.binary_cross_entropy_with_logits, 4, 3),
    "summed": (lambda: mlp(2, 12, 2, activation=nn.Sigmoid), summed, 2, 2),
    "one layer": (lambda: mlp(3, 2), F.mse_loss, 3, 2),
    "wide data": (lambda: mlp(401, 96, 5, activation=nn.SiLU), F.cross_entropy, 401, 5),  # its first layer is factored
}


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device of a test, where the resident executor runs."""
    if request.param == "cuda":
        if native.cuda_extension() is None:
            lack("cuda", native.cuda_missing_reason())
        return "cuda"
    if not resident_shim.compiler():
        lack("compiler", "g++ was not found")
    extension = resident_shim.extension()
    monkeypatch.setattr(native, "_load_cuda", lambda: (extension, ""))
    monkeypatch.setattr(resident, "DEVICE", "cpu")
    monkeypatch.setattr(resident, "_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as a CPU's tensors say of theirs
    return "cpu"


on_a_gpu = pytest.mark.parametrize("where", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def make(case: str, dtype: torch.dtype, where: str, **options: Any) -> tuple[fm.MAML, fm.TaskBatch, nn.Module]:
    """A learner that must use the resident executor, and tasks."""
    model, loss, fan_in, out = CASES[case]
    module = model().to(where, dtype)
    options = {"lr": 0.1, "steps": 3, "executor": "native", **options}
    return fm.MAML(module, loss, **options), tasks_for(loss, fan_in, out, dtype, where), module


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_in_float64(where: str, case: str, first_order: bool) -> None:
    maml, tasks, module = make(case, torch.float64, where, first_order=first_order)
    assert str(maml.explain(tasks).executor).startswith("resident")
    assert {row.backend for row in maml.explain(tasks).rows} == {"cuda"}
    loss, losses, logits, grads = maml_loop(module, CASES[case][1], tasks.support, tasks.query, 0.1, 3, first_order)
    value, gradient = maml.value_and_grad(tasks)
    assert relative_error(value, loss.detach()) < FLOAT64_BOUND
    assert relative_error(gradient, grads) < FLOAT64_BOUND
    out = maml(tasks)
    assert relative_error(out.task_losses.detach(), losses) < FLOAT64_BOUND
    assert relative_error(out.logits.detach(), logits) < FLOAT64_BOUND
    out.loss.backward()
    assert relative_error({n: p.grad for n, p in module.named_parameters()}, grads) < FLOAT64_BOUND


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("sinusoid", "binary")])  # those with kinks can flip
def test_float32_is_as_exact_as_the_reference(where: str, case: str) -> None:
    maml, tasks, module = make(case, torch.float32, where)
    reference = fm.MAML(module, CASES[case][1], lr=0.1, steps=3, executor="reference")
    wide = [tuple(t.double() if t.is_floating_point() else t for t in s) for s in (tasks.support, tasks.query)]
    double = CASES[case][0]().double().to(where)
    double.load_state_dict({n: p.double() for n, p in module.state_dict().items()})
    *_, truth = maml_loop(double, CASES[case][1], *wide, 0.1, 3)
    peer = relative_error(reference.value_and_grad(tasks)[1], truth)
    # sums over up to 65 features and 6 rows round some ten times
    assert relative_error(maml.value_and_grad(tasks)[1], truth) < 2 * peer + 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", ["scalar", "step", "tensor"])
def test_learned_rates(where: str, kind: str) -> None:
    module = CASES["gelu classes"][0]().double().to(where)
    if kind == "tensor":
        lr: Any = {
            n: nn.Parameter(torch.rand((), device=where, dtype=torch.float64)) for n, _ in module.named_parameters()
        }
    else:
        lr = nn.Parameter(torch.rand((3,) if kind == "step" else (), device=where, dtype=torch.float64))
    tasks = tasks_for(F.cross_entropy, 7, 5, torch.float64, where)
    made = [fm.MAML(module, F.cross_entropy, lr=lr, steps=3, executor=e) for e in ("native", "reference")]
    (_, ours), (_, theirs) = (maml.value_and_grad(tasks) for maml in made)
    assert relative_error(ours, theirs) < FLOAT64_BOUND
    assert any(name.startswith("lr") for name in ours)


@pytest.mark.parametrize("case", ["gelu classes", "wide data"])
def test_a_head_that_adapts_alone(where: str, case: str) -> None:
    maml, tasks, module = make(case, torch.float64, where)
    head = [n for n, _ in module.named_parameters()][-2:]
    maml = fm.MAML(module, F.cross_entropy, lr=0.1, steps=2, parameters=head, executor="native")
    *_, truth = maml_loop(module, F.cross_entropy, tasks.support, tasks.query, 0.1, 2, adapted_names=head)
    assert relative_error(maml.value_and_grad(tasks)[1], truth) < FLOAT64_BOUND


def test_images_whose_first_layer_is_factored(where: str) -> None:
    module = nn.Sequential(nn.Flatten(), *mlp(784, 64, 64, 5, activation=nn.ReLU)).to(where, torch.float64)
    flat = tasks_for(F.cross_entropy, 784, 5, torch.float64, where)
    sets = [(x.reshape(T, -1, 1, 28, 28), y) for x, y in (flat.support, flat.query)]
    tasks = fm.TaskBatch(*sets)
    lr = nn.Parameter(torch.full((2,), 0.1, dtype=torch.float64, device=where))
    maml = fm.MAML(module, F.cross_entropy, lr=lr, steps=2, executor="native")
    assert maml.explain(tasks).executor.endswith("the first layer by inner products of its rows")
    reference = fm.MAML(module, F.cross_entropy, lr=lr, steps=2, executor="reference")
    (value, gradient), (truth, expected) = maml.value_and_grad(tasks), reference.value_and_grad(tasks)
    assert relative_error(value, truth) < FLOAT64_BOUND
    assert relative_error(gradient, expected) < FLOAT64_BOUND
    assert [tuple(d.shape) for d in gradient.values()][:2] == [(64, 784), (64,)]


@pytest.mark.parametrize("first_order", [False, True])
def test_a_factored_first_layer_that_gets_no_gradient(where: str, first_order: bool) -> None:
    maml, tasks, module = make("wide data", torch.float64, where)
    module[0].weight.requires_grad_(False)
    *_, truth = maml_loop(module, F.cross_entropy, tasks.support, tasks.query, 0.1, 2, first_order)
    maml = fm.MAML(module, F.cross_entropy, lr=0.1, steps=2, first_order=first_order, executor="native")
    gradient = maml.value_and_grad(tasks)[1]
    assert "0.weight" not in gradient
    assert relative_error(gradient, {n: truth[n] for n in gradient}) < FLOAT64_BOUND


def test_another_objective_on_the_task_losses(where: str) -> None:
    grads = []
    for executor in ("native", "reference"):
        torch.manual_seed(1)
        maml, tasks, module = make("tanh", torch.float64, where, executor=executor)
        (maml(tasks).task_losses ** 2).sum().backward()
        grads.append({n: p.grad for n, p in module.named_parameters()})
    assert relative_error(*grads) < FLOAT64_BOUND


def test_the_same_bits_again(where: str) -> None:
    maml, tasks, _ = make("sinusoid", torch.float32, where)
    first, others = maml.value_and_grad(tasks), [maml.value_and_grad(tasks) for _ in range(20)]
    for value, gradient in others:
        assert torch.equal(value, first[0])
        assert all(torch.equal(gradient[n], d) for n, d in first[1].items())


@pytest.mark.parametrize("tasks", [1, 3, 700])
def test_numbers_of_tasks(where: str, tasks: int) -> None:
    module = CASES["one layer"][0]().double().to(where)
    batch = tasks_for(F.mse_loss, 3, 2, torch.float64, where, tasks)
    maml = fm.MAML(module, F.mse_loss, lr=0.1, steps=2, executor="native")
    reference = fm.MAML(module, F.mse_loss, lr=0.1, steps=2, executor="reference")
    assert relative_error(maml.value_and_grad(batch)[1], reference.value_and_grad(batch)[1]) < FLOAT64_BOUND


def test_tensors_may_lie_as_they_like(where: str) -> None:
    maml, tasks, module = make("gelu classes", torch.float64, where)
    *_, truth = maml_loop(module, F.cross_entropy, tasks.support, tasks.query, 0.1, 3)
    strewn = [tuple(torch.stack([t, t], -1)[..., 0] for t in batch) for batch in (tasks.support, tasks.query)]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.set_(torch.stack([parameter, parameter], -1)[..., 1])
    batch = fm.TaskBatch(*strewn)
    assert not any(t.is_contiguous() for t in (*batch.support, *batch.query, module[0].weight))
    assert relative_error(maml.value_and_grad(batch)[1], truth) < FLOAT64_BOUND


def test_steps_that_shared_memory_cannot_hold(where: str) -> None:
    maml, tasks, module = make("tanh", torch.float64, where, steps=12)
    assert "kept in global memory" in maml.explain(tasks).executor
    *_, truth = maml_loop(module, F.mse_loss, tasks.support, tasks.query, 0.1, 12)
    assert relative_error(maml.value_and_grad(tasks)[1], truth) < FLOAT64_BOUND


def test_what_does_not_fit_runs_on_the_reference_and_says_why(where: str) -> None:
    module = mlp(784, 256, 128, 5).to(where)
    tasks = tasks_for(F.cross_entropy, 784, 5, torch.float32, where)
    assert "bytes of shared memory" in fm.MAML(module, F.cross_entropy, lr=0.1, steps=1).explain(tasks).executor
    with pytest.raises(RuntimeError, match="executor 'native' is not available here: a task takes"):
        fm.MAML(module, F.cross_entropy, lr=0.1, steps=1, executor="native").value_and_grad(tasks)


@on_a_gpu
def test_a_graph_captures_and_replays_it(where: str) -> None:
    maml, tasks, _ = make("sinusoid", torch.float32, where)
    maml.value_and_grad(tasks)  # made ready
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        maml.value_and_grad(tasks)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = maml.value_and_grad(tasks)
    new = tasks_for(F.mse_loss, 1, 1, torch.float32, where)
    for own, other in zip((*tasks.support, *tasks.query), (*new.support, *new.query), strict=True):
        own.copy_(other)
    graph.replay()
    eager, truth = maml.value_and_grad(new)
    assert torch.equal(value, eager)
    assert all(torch.equal(gradient[n], d) for n, d in truth.items())


@on_a_gpu
def test_nothing_waits_for_the_device(where: str) -> None:
    maml, tasks, _ = make("sinusoid", torch.float32, where)
    maml.value_and_grad(tasks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        maml.value_and_grad(tasks)
    finally:
        torch.cuda.set_sync_debug_mode("default")

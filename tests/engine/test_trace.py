"""What cannot be traced runs on autodiff and says why; nothing loses a derivative on the way."""

from __future__ import annotations

import re
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import exported_program

import fastmeta as fm
from fastmeta.engine import trace
from fastmeta.engine.objective import Objective
from tests.engine.cases import CASES, T, labels, normal
from tests.oracle import maml_loop, relative_error


def sets():
    return tuple((torch.randn(T, n, 4, dtype=torch.float64), torch.randint(3, (T, n))) for n in (5, 6))


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Softmax2d(), nn.Flatten(), nn.Linear(64, 3))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


SPARED = {
    **{name: (case.model, case.inputs, case.targets, case.loss) for name, case in CASES.items()},
    "group norm": (lambda: normed(nn.GroupNorm(2, 4)), normal(2, 6, 6), labels, F.cross_entropy),
    "instance norm": (lambda: normed(nn.InstanceNorm2d(4, affine=True)), normal(2, 6, 6), labels, F.cross_entropy),
    "gru": (Gated, normal(4, 2), labels, F.cross_entropy),
}


@pytest.mark.parametrize("name", SPARED)
def test_preparing_few_composite_operations_changes_no_graph(name, monkeypatch):
    model, inputs, targets, loss = SPARED[name]
    objective, batch = Objective(model().double(), loss), (inputs(5)[0], targets(5)[0])
    parameters, buffers = objective.parameters(), objective.buffers()
    assert hasattr(exported_program, trace.COLLECT), "this PyTorch collects composite operations otherwise"
    assert hasattr(exported_program, trace.IS_ONE), "this PyTorch tells composite operations otherwise"

    def calls():
        nodes = trace.trace(objective, parameters, buffers, batch).nodes
        return [(str(n.call.target), n.inputs, n.outputs, n.module) for n in nodes]

    few = calls()
    with monkeypatch.context() as patch:
        patch.setattr(trace, "COLLECT", "a name that PyTorch has not")
        assert calls() == few
    monkeypatch.setattr(exported_program, trace.COLLECT, lambda: pytest.fail("all of them were collected"))
    assert calls() == few


def test_threads_that_trace_leave_pytorch_as_it_was():
    name, before, done = trace.COLLECT, getattr(exported_program, trace.COLLECT), []

    def run():
        maml = fm.MAML(nn.Linear(4, 3).double(), F.cross_entropy, lr=0.1, steps=1)
        done.append(maml.value_and_grad(fm.TaskBatch(*sets())))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 3
    assert getattr(exported_program, name) is before
    # nor is a function's own backward, such as a meta-step's, taken for one in a trace
    fm.MAML(nn.Linear(4, 3).double(), F.cross_entropy, lr=0.1, steps=1)(fm.TaskBatch(*sets())).loss.backward()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6).double()
        self.head = nn.Linear(6, 3).double()


class Branches(Base):
    def forward(self, x):
        h = self.inner(x)
        return self.head(torch.tanh(h) if h.sum() > 0 else torch.sigmoid(h))


class Reads(Base):
    def forward(self, x):
        h = self.inner(x)
        return self.head(h * float(h.detach().abs().max()))


class Straight(torch.autograd.Function):
    """Rounds, and passes the gradient through as if it had not."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, d):
        return d


class Rounds(Base):
    def forward(self, x):
        return self.head(Straight.apply(self.inner(x)))


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            scale = self.inner(x).std()
        return self.head(self.inner(x) / scale)


class Data(Base):
    def forward(self, x):
        h = self.inner(x)
        return self.head(h * h.data.sigmoid())


class Hooked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.head.register_full_backward_hook(lambda module, d_x, d_y: (2 * d_x[0],))

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)))


def quantised(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)


class Quantised(Base):
    """Features of a fixed int8 layer; ``inner`` adapts behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = quantised(nn.Linear(4, 4))

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.body(x.float()).double())))


OUTSIDE = torch.ones(6, dtype=torch.float64, requires_grad=True)


class Closure(Base):
    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)) * OUTSIDE)


CASES = {
    Branches: "data-dependent",
    Reads: "data-dependent",
    Rounds: "Straight brings its own backward",
    NoGrad: "no_grad",
    Data: r"\.data",
    Hooked: "backward hook",
    Closure: "neither a parameter",
    Quantised: "module body.0._packed_params holds packed weights",
}


@pytest.mark.parametrize("kind", CASES)
def test_it_runs_on_autodiff_and_names_the_cause_once(kind) -> None:
    model, tasks = kind(), fm.TaskBatch(*sets())
    maml = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2)
    with pytest.warns(UserWarning, match=CASES[kind]):
        loss = maml(tasks).loss
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml(tasks)
    explicit = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="autodiff").value_and_grad(tasks)[1]
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, explicit) <= 1e-12
    assert re.search(CASES[kind], str(maml.explain(tasks)))


@pytest.mark.parametrize("kind", CASES)
def test_the_program_asked_for_raises_with_the_reason(kind) -> None:
    maml = fm.MAML(kind(), F.cross_entropy, engine="program")
    with pytest.raises(RuntimeError, match=CASES[kind]):
        maml(fm.TaskBatch(*sets()))


class Blocked(Base):
    """A quantised layer between ``inner`` and ``head``, through which no derivative passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = quantised(nn.Linear(6, 6))

    def forward(self, x):
        return self.head(self.body(self.inner(x).float()).double())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("parameters", [None, ["head.*"]])
def test_a_call_without_a_derivative_raises(first_order, parameters) -> None:
    model, tasks = Blocked(), fm.TaskBatch(*sets())
    maml = fm.MAML(model, F.cross_entropy, engine="autodiff", first_order=first_order, parameters=parameters)
    with pytest.raises(ValueError, match=r"must have a derivative.*quantised layer.*requires_grad_\(False\)"):
        maml(tasks)
    model.inner.requires_grad_(False)
    maml = fm.MAML(model, F.cross_entropy, engine="autodiff", first_order=first_order)
    grads = maml.value_and_grad(tasks)[1]
    truth = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.01, 1, first_order)
    assert relative_error(grads, truth[3]) <= 1e-12


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    before = {n: (id(p), p.clone()) for n, p in (*model.named_parameters(), *model.named_buffers())}
    fm.MAML(model, F.cross_entropy)(fm.TaskBatch(*sets()))
    for n, t in (*model.named_parameters(), *model.named_buffers()):
        assert before[n][0] == id(t)
        assert torch.equal(before[n][1], t)
    apply = torch.autograd.Function.apply
    assert apply.__func__ is not None
    assert Straight.apply(torch.ones(1)).item() == 1


def test_under_autocast_plain_autograd_runs() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    tasks = fm.TaskBatch(*sets()).to(dtype=torch.float32)
    maml = fm.MAML(model, F.cross_entropy, lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        out = maml(tasks)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert maml(tasks).logits.dtype == torch.float32


def test_detach_blocks_both_derivatives() -> None:
    class Detaches(Base):
        def forward(self, x):
            h = self.inner(x)
            return self.head(torch.tanh(h) * h.detach().abs())

    model, tasks = Detaches(), fm.TaskBatch(*sets())
    program = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="program").value_and_grad(tasks)[1]
    autodiff = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="autodiff").value_and_grad(tasks)[1]
    assert relative_error(program, autodiff) <= 1e-9


def test_noise_differs_between_tasks_and_is_replayed() -> None:
    class Noisy(Base):
        def forward(self, x):
            h = self.inner(x)
            return self.head(torch.tanh(h + torch.rand_like(h)))

    model = Noisy()
    one = tuple(tuple(x[:1].expand(T, *x.shape[1:]) for x in s) for s in sets())
    out = fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, engine="program")(fm.TaskBatch(*one))
    assert out.task_losses.unique().numel() == T
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_new_shapes_are_traced_and_old_ones_remembered() -> None:
    calls = []

    class Counts(Base):
        def forward(self, x):
            calls.append(tuple(x.shape))
            return self.head(torch.tanh(self.inner(x)))

    maml = fm.MAML(Counts(), F.cross_entropy, engine="program")
    support, query = sets()
    maml(fm.TaskBatch(support, query))
    traced = len(calls)
    maml(fm.TaskBatch(support, query))
    maml(fm.TaskBatch(tuple(x[:2] for x in support), tuple(x[:2] for x in query)))
    assert len(calls) == traced
    maml(fm.TaskBatch(query, query))
    assert len(calls) == traced
    maml(fm.TaskBatch(tuple(x[:, :3] for x in support), query))
    assert len(calls) > traced
    traced = len(calls)
    maml.retrace()
    maml(fm.TaskBatch(support, query))
    assert len(calls) > traced

"""The native executor gives what the reference does, or says why it cannot."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from tests.oracle import maml_loop, relative_error, total_error

_C = native.extension()
pytestmark = pytest.mark.skipif(_C is None, reason=f"no extension: {native.missing_reason()}")
EXACT = 1e-11  # float64 rounding of a few thousand operations; a wrong term shows above 1e-3

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}
LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "cross entropy": F.cross_entropy,
    "bce": F.binary_cross_entropy_with_logits,
}
SETS = [name for name in ("plain", "v3", "v4") if _C is not None and name in _C.supported_instruction_sets()]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set("")


def network(*widths: int, activation: str = "relu", bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(sum(widths))
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(dtype)


shared = functools.cache(network)  # for tests that leave it as it is: one trace serves them


def batch_of(
    features: int, outputs: int, loss: str, sizes: tuple[int, int] = (4, 7), tasks: int = 5, dtype=torch.float64
) -> fm.TaskBatch:
    torch.manual_seed(1)
    made = []
    for n in sizes:
        x = torch.randn(tasks, n, features, dtype=dtype)
        y = {
            "mse": lambda n=n: torch.randn(tasks, n, outputs, dtype=dtype),
            "cross entropy": lambda n=n: torch.randint(outputs, (tasks, n)),
            "bce": lambda n=n: torch.rand(tasks, n, outputs, dtype=dtype),
        }[loss]()
        made.append((x, y))
    return fm.TaskBatch(*made)


def truth(model: nn.Module, loss: Callable[..., Tensor], tasks: fm.TaskBatch, lr: float, steps: int):
    exact = tasks.to(dtype=torch.float64)
    return maml_loop(copy.deepcopy(model).double(), loss, exact.support, exact.query, lr, steps)


def check_float32(model: nn.Module, tasks: fm.TaskBatch, lr: float) -> None:
    """One step in float32 is within twice PyTorch's own error, and a few roundings of our own."""
    small, single = copy.deepcopy(model).float(), tasks.to(dtype=torch.float32)
    right = truth(small, F.cross_entropy, single, lr, 1)[3]
    ours = fm.MAML(small, F.cross_entropy, lr=lr, executor="native").value_and_grad(single)[1]
    torchs = maml_loop(small, F.cross_entropy, single.support, single.query, lr, 1)[3]
    assert total_error(ours, right) <= 2 * total_error(torchs, right) + 1e-6


def both(model: nn.Module, loss: Callable[..., Tensor], tasks: fm.TaskBatch, **options):
    """Loss and gradients by the native and by the reference executor, of one trace."""
    maml, found = fm.MAML(model, loss, **options), []
    for maml.executor in ("native", "reference"):
        found.append(maml.value_and_grad(tasks))
    return found


@pytest.mark.parametrize(
    ("activation", "loss", "steps"),
    [(name, ("mse", "cross entropy", "bce")[i % 3], 1) for i, name in enumerate(ACTIVATIONS)]
    + [("gelu", loss, steps) for loss in LOSSES for steps in (0, 3)],
)
@pytest.mark.usefixtures("traced_once")
def test_small_networks_in_both_precisions(activation: str, loss: str, steps: int) -> None:
    model, tasks = shared(3, 40, 17, 5, activation=activation), batch_of(3, 5, loss)
    found = fm.MAML(model, LOSSES[loss], lr=0.1, steps=steps, executor="native").value_and_grad(tasks)
    right = truth(model, LOSSES[loss], tasks, 0.1, steps)
    assert float(found[0]) == pytest.approx(float(right[0]), rel=1e-12)
    assert relative_error(found[1], right[3]) <= EXACT

    single = tasks.to(dtype=torch.float32)
    small = shared(3, 40, 17, 5, activation=activation, dtype=torch.float32)
    right = truth(small, LOSSES[loss], single, 0.1, steps)
    ours = fm.MAML(small, LOSSES[loss], lr=0.1, steps=steps, executor="native").value_and_grad(single)[1]
    torchs = maml_loop(small, LOSSES[loss], single.support, single.query, 0.1, steps)[3]
    assert (
        total_error(ours, right[3]) <= 2 * total_error(torchs, right[3]) + 4e-7
    )  # a few roundings where torch has none


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "widths", [(1, 1), (2, 1, 3), (5, 16, 16, 1), (7, 33, 15, 256, 2), (3, 8, 8, 8, 8, 8, 4), (3, 400, 370, 2)]
)
def test_every_instruction_set(instruction_set: str, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    model, tasks = shared(*widths, activation="tanh", dtype=dtype), batch_of(widths[0], widths[-1], "mse", dtype=dtype)
    maml = fm.MAML(model, F.mse_loss, lr=0.05, steps=2, executor="native")
    error = total_error(maml.value_and_grad(tasks)[1], truth(model, F.mse_loss, tasks, 0.05, 2)[3])
    # float32: eps times the square root of the longest sum, 256 terms, through five layers and two steps
    assert error <= (EXACT if dtype == torch.float64 else 5e-6)
    assert f"instruction set {instruction_set}" in maml.explain(tasks).executor


@pytest.mark.parametrize(
    "options",
    [
        {"first_order": True},
        {
            "lr": {
                n: 0.02 * (i + 1)
                for i, n in enumerate(["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"])
            }
        },
        {"lr": torch.tensor([0.1, 0.05, 0.2])},
        {"lr": torch.tensor(0.1)},
        {"parameters": ["4.*"]},
        {"parameters": ["0.weight", "2.*"]},
        {"parameters": ["2.*"], "first_order": True},
    ],
    ids=["first order", "rate a tensor", "rate a step", "tensor rate", "head", "some", "some, first order"],
)
@pytest.mark.usefixtures("traced_once")
def test_options_agree_with_the_reference(options: dict[str, object]) -> None:
    model, tasks = shared(3, 9, 8, 4, activation="silu"), batch_of(3, 4, "cross entropy")
    (loss, ours), (right, reference) = both(model, F.cross_entropy, tasks, **{"lr": 0.1, "steps": 3, **options})
    assert float(loss) == pytest.approx(float(right), rel=1e-12)
    assert relative_error(ours, reference) <= EXACT


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("kind", ["one", "a step", "a tensor"])
@pytest.mark.parametrize("first_order", [False, True])
def test_learned_rates(kind: str, first_order: bool) -> None:
    model, tasks = shared(3, 9, 4, activation="tanh"), batch_of(3, 4, "cross entropy")
    names = [n for n, _ in model.named_parameters()]

    def rate() -> object:
        if kind == "a tensor":
            return {n: nn.Parameter(torch.tensor(0.03 * (i + 1), dtype=torch.float64)) for i, n in enumerate(names)}
        return nn.Parameter(torch.tensor(0.1 if kind == "one" else [0.1, 0.05, 0.2, 0.7], dtype=torch.float64))

    (_, ours), (_, reference) = (
        fm.MAML(model, F.cross_entropy, lr=rate(), steps=3, first_order=first_order, executor=e).value_and_grad(tasks)
        for e in ("native", "reference")
    )
    assert any(name.startswith("lr") for name in ours)
    assert relative_error(ours, reference) <= EXACT


def test_parameters_that_are_frozen_altogether() -> None:
    model, tasks = network(3, 9, 8, 4), batch_of(3, 4, "cross entropy")
    model[0].requires_grad_(False)
    (_, ours), (_, reference) = both(model, F.cross_entropy, tasks, lr=0.1, steps=2)
    assert set(ours) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    assert relative_error(ours, reference) <= EXACT


def test_no_bias_one_task_and_one_sample() -> None:
    model, tasks = network(6, 5, 1, bias=False, activation="gelu"), batch_of(6, 1, "mse", (1, 1), tasks=1)
    found = fm.MAML(model, F.mse_loss, lr=0.1, steps=2, executor="native").value_and_grad(tasks)[1]
    assert relative_error(found, truth(model, F.mse_loss, tasks, 0.1, 2)[3]) <= EXACT


def test_tensors_that_are_not_contiguous() -> None:
    model, tasks = network(3, 9, 4), batch_of(3, 4, "mse")
    odd = fm.TaskBatch(
        *(tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in s) for s in (tasks.support, tasks.query))
    )
    spread = fm.TaskBatch(*(tuple(torch.stack([t, t + 1], 1)[:, 0] for t in s) for s in (tasks.support, tasks.query)))
    with torch.no_grad():
        model[0].weight.set_(model[0].weight.t().contiguous().t())
    maml = fm.MAML(model, F.mse_loss, lr=0.1, steps=2, executor="native")
    right = truth(model, F.mse_loss, tasks, 0.1, 2)[3]
    for batch in (tasks, odd, spread):
        assert relative_error(maml.value_and_grad(batch)[1], right) <= EXACT


def test_forward_gives_outputs_losses_and_backward() -> None:
    model, tasks = network(3, 9, 4), batch_of(3, 4, "cross entropy")
    outs = [fm.MAML(model, F.cross_entropy, lr=0.1, steps=2, executor=e)(tasks) for e in ("native", "reference")]
    for ours, right in zip(*outs, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-12)
    gradients = []
    for out in outs:
        objective = (out.task_losses * torch.arange(5)).sum() + 2 * out.loss  # cotangents of single tasks
        gradients.append(dict(enumerate(torch.autograd.grad(objective, list(model.parameters())))))
    assert relative_error(*gradients) <= EXACT


def test_labels_to_ignore_and_labels_out_of_range() -> None:
    model, tasks = network(3, 9, 4), batch_of(3, 4, "cross entropy")
    tasks.support[1][:, 1] = -100
    (_, ours), (_, reference) = both(model, F.cross_entropy, tasks, lr=0.1, steps=2)
    assert relative_error(ours, reference) <= EXACT
    tasks.query[1][2, 3] = 4
    with pytest.raises(ValueError, match=r"labels must be in \[0, 4\), got 4"):
        fm.MAML(model, F.cross_entropy, executor="native").value_and_grad(tasks)


def test_values_that_are_not_finite_are_named() -> None:
    model, tasks = network(3, 9, 4), batch_of(3, 4, "mse")
    tasks.query[1][3] = torch.inf
    loss, _ = fm.MAML(model, F.mse_loss, lr=0.1, executor="native").value_and_grad(tasks)
    assert not torch.isfinite(loss)
    with pytest.raises(ValueError, match="task 3"):
        fm.MAML(model, F.mse_loss, lr=0.1, executor="native", check_finite=True).value_and_grad(tasks)
    with pytest.raises(ValueError, match="support loss at inner step"):
        fm.MAML(model, F.mse_loss, lr=1e200, steps=3, executor="native", check_finite=True).value_and_grad(
            batch_of(3, 4, "mse")
        )


def test_tied_weights_fall_to_the_reference() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, tasks = Tied().double(), batch_of(3, 3, "mse")
    maml = fm.MAML(model, F.mse_loss, lr=0.1, steps=2)
    assert relative_error(maml.value_and_grad(tasks)[1], truth(model, F.mse_loss, tasks, 0.1, 2)[3]) <= EXACT
    assert "parameter layer.weight has several readers" in maml.explain(tasks).executor


@pytest.mark.parametrize("widths", [(3, 40, 4), (3, 400, 370, 4)])
def test_the_number_of_threads_and_of_callers_changes_no_bit(widths: tuple[int, ...]) -> None:
    model, tasks = network(*widths, dtype=torch.float32), batch_of(3, 4, "mse", tasks=37, dtype=torch.float32)
    maml = fm.MAML(model, F.mse_loss, lr=0.1, steps=3, executor="native")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(maml.value_and_grad(tasks)[1])
    torch.set_num_threads(before)
    callers = [threading.Thread(target=lambda: results.append(maml.value_and_grad(tasks)[1])) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 10
    for other in results[1:]:
        assert all(torch.equal(results[0][n], other[n]) for n in other)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("activation", ["gelu", "tanh", "relu"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_that_are_copied_in_panels(activation: str, learned: bool, dtype: torch.dtype) -> None:
    """Above half a megabyte; 400 rows are more than a panel is deep, 370 columns no whole number of panels."""
    model = shared(5, 400, 370, 3, activation=activation, dtype=dtype)
    tasks = batch_of(5, 3, "mse", sizes=(9, 14), tasks=3, dtype=dtype)
    rate = torch.tensor(0.05, dtype=dtype)
    maml = fm.MAML(model, F.mse_loss, lr=nn.Parameter(rate) if learned else rate, steps=2, executor="native")
    error = total_error(maml.value_and_grad(tasks)[1], truth(model, F.mse_loss, tasks, 0.05, 2)[3])
    # float32: eps times the square root of 400 terms, through three layers and two steps
    assert error <= (EXACT if dtype == torch.float64 else 1e-5)


@settings(deadline=None, max_examples=12)
@given(
    widths=st.lists(st.integers(1, 70), min_size=2, max_size=5),
    activation=st.sampled_from(list(ACTIVATIONS)),
    loss=st.sampled_from(list(LOSSES)),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    tasks=st.integers(1, 40),
    steps=st.integers(0, 4),
    bias=st.booleans(),
)
def test_random_networks(widths, activation, loss, sizes, tasks, steps, bias) -> None:
    model = network(*widths, activation=activation, bias=bias)
    batch = batch_of(widths[0], widths[-1], loss, sizes, tasks)
    (value, ours), (right, reference) = both(model, LOSSES[loss], batch, lr=0.1, steps=steps)
    assert float(value) == pytest.approx(float(right), rel=1e-10)
    assert total_error(ours, reference) <= 1e-10  # float64, up to four layers and steps in both executors


def test_a_change_of_the_model_is_seen() -> None:
    model, tasks = network(3, 9, 4), batch_of(3, 4, "mse")
    maml = fm.MAML(model, F.mse_loss, lr=0.1, steps=1, executor="native")
    maml.value_and_grad(tasks)

    model[2].requires_grad_(False)
    assert set(maml.value_and_grad(tasks)[1]) == {"0.weight", "0.bias"}
    model[2].requires_grad_(True)
    model[2] = nn.Linear(9, 4).double()
    assert relative_error(maml.value_and_grad(tasks)[1], truth(model, F.mse_loss, tasks, 0.1, 1)[3]) <= EXACT
    model[0].weight.data = torch.randn(9, 3, dtype=torch.float64)
    assert relative_error(maml.value_and_grad(tasks)[1], truth(model, F.mse_loss, tasks, 0.1, 1)[3]) <= EXACT
    maml.steps = 2
    assert relative_error(maml.value_and_grad(tasks)[1], truth(model, F.mse_loss, tasks, 0.1, 2)[3]) <= EXACT
    model.float()
    with pytest.raises(TypeError, match="dtype"):
        maml.value_and_grad(tasks)

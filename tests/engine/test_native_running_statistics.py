"""Batch norm in evaluation mode on the native executor: constant statistics, exact second order."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmeta as fm
from fastmeta.core import native
from tests.engine.test_native import ACTIVATIONS, SETS, check_float32
from tests.engine.test_native_convolutions import EXACT, WAYS, block, episodes
from tests.oracle import maml_loop, total_error

pytestmark = [
    pytest.mark.skipif(native.extension() is None, reason=f"no extension: {native.missing_reason()}"),
    pytest.mark.usefixtures("one_thread", "traced_once"),
]


def trained(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode, with weights and statistics of its batch norms away from where they start."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias, std=0.2)
    return model.double().eval()


def network(*blocks: dict[str, object], channels: int = 2, size: int = 9, filters: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, kinds in enumerate(blocks):
        layers += block(filters if i else channels, filters, **{"norm": nn.BatchNorm2d(filters), **kinds})
    body = nn.Sequential(*layers, nn.Flatten())
    features = body(torch.randn(2, channels, size, size)).shape[1]
    return trained(nn.Sequential(*body, nn.Linear(features, WAYS)))


def error(model: nn.Module, tasks: fm.TaskBatch, lr: float = 0.2, steps: int = 2, **options: object) -> float:
    found = fm.MAML(model, F.cross_entropy, lr=lr, steps=steps, executor="native", **options).value_and_grad(tasks)
    right = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, lr, steps, options.get("first_order", False))
    assert float(found[0]) == pytest.approx(float(right[0]), rel=1e-11)
    return total_error(found[1], right[3])


KINDS: dict[str, Callable[[], nn.Module]] = {
    "conv4": lambda: network({}, {}, {}, {}, channels=1, size=28),
    "no affine": lambda: network({"norm": nn.BatchNorm2d(8, affine=False)}, {"norm": nn.BatchNorm2d(8, affine=False)}),
    "no bias": lambda: network({"bias": False}, {"bias": False}),
    "no pool": lambda: network({"pool": None}, {"pool": None, "stride": 2}),
    "average pool": lambda: network({"pool": nn.AvgPool2d(2)}, {"pool": nn.AvgPool2d(2)}),
    "many channels": lambda: network({}, {}, filters=33),
    **{
        name: lambda make=make: network({"activation": make()}, {"activation": make()})
        for name, make in ACTIVATIONS.items()
    },
}


@pytest.mark.parametrize("name", list(KINDS))
def test_blocks_in_evaluation_mode(name: str) -> None:
    model = KINDS[name]()
    size = 28 if name == "conv4" else 9
    assert error(model, episodes(model[0].in_channels, size)) <= EXACT


@functools.cache
def plain() -> nn.Module:
    return network({}, {})


@functools.cache
def bent() -> nn.Module:
    return network({}, {"activation": nn.Tanh()})


@functools.cache
def many() -> nn.Module:
    return network({}, {"activation": nn.SiLU()}, filters=20)


@pytest.mark.parametrize("options", [{"first_order": True}, {"steps": 0}, {"steps": 4, "lr": 0.05}], ids=str)
def test_options(options: dict[str, object]) -> None:
    assert error(plain(), episodes(2, 9), **options) <= EXACT


@pytest.mark.parametrize("parameters", [["0.bias"], ["1.*"], ["4.*", "5.bias"], ["9.*"]], ids=str)
def test_some_parameters_adapt(parameters: list[str]) -> None:
    model, tasks = bent(), episodes(2, 9)
    ours, right = (
        fm.MAML(model, F.cross_entropy, lr=0.2, steps=2, executor=e, parameters=parameters).value_and_grad(tasks)[1]
        for e in ("native", "reference")
    )
    assert total_error(ours, right) <= EXACT


class Alone(nn.Module):
    """Batch norms of images, of rows and of the data that no convolution takes along."""

    def __init__(self, activation: nn.Module, affine: bool) -> None:
        super().__init__()
        self.data, self.images = nn.BatchNorm2d(2, affine=affine), nn.BatchNorm2d(6, affine=affine)
        self.rows, self.activation = nn.BatchNorm1d(20, affine=affine), activation
        self.layer, self.middle, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 20), nn.Linear(20, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.data(x))
        h = self.activation(self.images(h + torch.tanh(h)))
        return self.head(self.activation(self.rows(self.middle(h.mean((2, 3))))))


@functools.cache
def alone(activation: str, affine: bool) -> nn.Module:
    torch.manual_seed(0)
    return trained(Alone(ACTIVATIONS[activation](), affine))


# Without weights of its own a norm reads ones and zeros in their place: a straight curve and a bent one show that.
@pytest.mark.parametrize(
    ("activation", "affine"), [*((name, True) for name in ACTIVATIONS), ("relu", False), ("silu", False)]
)
def test_norms_that_no_convolution_takes_along(activation: str, affine: bool) -> None:
    assert error(alone(activation, affine), episodes(2, 9)) <= EXACT


def test_one_norm_in_evaluation_mode_beside_one_in_training_mode() -> None:
    model = network({}, {})
    model[1].train()
    assert error(model, episodes(2, 9)) <= EXACT


def test_statistics_that_are_read_twice_run_on_the_reference() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=False)
    layers = [nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm, nn.Flatten(), nn.Linear(100, WAYS)]
    model, tasks = trained(nn.Sequential(*layers)), episodes(2, 9)
    maml = fm.MAML(model, F.cross_entropy, lr=0.2)
    assert "1.running_mean has several readers" in maml.explain(tasks).executor
    right = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.2, 1)[3]
    assert total_error(maml.value_and_grad(tasks)[1], right) <= EXACT


def test_statistics_that_change_between_calls() -> None:
    model, tasks = network({}, {}), episodes(2, 9)
    maml = fm.MAML(model, F.cross_entropy, lr=0.2, steps=2, executor="native")
    before = maml.value_and_grad(tasks)[1]
    model[1].running_mean += 0.2
    model[5].running_var *= 1.5
    right = maml_loop(model, F.cross_entropy, tasks.support, tasks.query, 0.2, 2)[3]
    assert total_error(maml.value_and_grad(tasks)[1], right) <= EXACT
    assert total_error(before, right) > 1e-3


def test_evaluation_mode_after_training_that_updates_the_statistics() -> None:
    model, tasks = network({}, {}).train(), episodes(2, 9)
    fm.MAML(model, F.cross_entropy, lr=0.2, update_running_stats=True).value_and_grad(tasks)
    assert error(model.eval(), tasks) <= EXACT


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_in_both_precisions(name: str) -> None:
    extension = native.extension()
    extension.use_instruction_set(name)
    try:
        for model in (many(), alone("gelu", True)):
            tasks = episodes(2, 9)
            assert error(model, tasks) <= EXACT
            check_float32(model, tasks, 0.2)
    finally:
        extension.use_instruction_set("")


@settings(deadline=None, max_examples=10)
@given(
    channels=st.integers(1, 5),
    filters=st.integers(1, 40),
    size=st.integers(4, 11),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.sampled_from([1, 3]),
    pool=st.sampled_from([None, nn.MaxPool2d(2), nn.AvgPool2d(2)]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    bias=st.booleans(),
)
def test_random_blocks(channels, filters, size, sizes, kernel, pool, activation, bias) -> None:
    kinds = {"kernel": kernel, "padding": kernel // 2, "pool": pool, "bias": bias}
    kinds["activation"] = ACTIVATIONS[activation]()
    model = network(kinds, {"pool": None}, channels=channels, size=size, filters=filters)
    assert error(model, episodes(channels, size, sizes), lr=0.05, steps=1) <= EXACT

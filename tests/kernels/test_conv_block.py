"""The convolution block: its reference against torch.func, and its Triton kernels against that."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastmeta.core.dispatch import Backend
from fastmeta.core.task_op import Call, Unsupported
from fastmeta.ops.conv_block import ConvBlock, tiles
from fastmeta.ops.conv_block.op import NAMES, Parts
from tests.kernels.conv_blocks import Drawn, Layer, Maps, distance
from tests.kernels.running import device, reversed_programs

aten = torch.ops.aten
FLOAT64_BOUND = 2e-12  # rounding through a few hundred terms; a wrong formula is many orders above it
SUMMATION_FACTOR = 8.0  # of the law in CONTRIBUTING.md

LAYERS = {
    "colour": Layer(),
    "grey": Layer(channels=1, out=5, size=(7, 7)),
    "whole tiles": Layer(channels=16, out=16, size=(5, 5), images=1),
    "part of a tile": Layer(channels=20, out=24, size=(3, 4)),
    "two tiles of channels": Layer(channels=32, out=70, size=(3, 3), images=1, pool=None),
    "strided": Layer(channels=16, out=16, size=(6, 5), stride=2, pool=None),
    "strided, part of a tile": Layer(channels=5, out=20, size=(6, 7), stride=2),
    "pointwise": Layer(channels=4, out=6, size=(3, 4), kernel=1, padding=0, pool=None),
    "large kernel": Layer(channels=2, out=5, size=(7, 6), kernel=5, padding=1, pool=None),
    "plain": Layer(bias=True, norm="none", activation="identity", pool=None),
    "norm alone": Layer(norm="batch", activation="identity", pool=None),
    "norm and pool": Layer(norm="affine", activation="identity"),
    "activation alone": Layer(bias=True, norm="none", pool=None),
    "pool alone": Layer(bias=True, norm="none", activation="identity"),
    "no norm": Layer(bias=True, norm="none", activation="leaky_relu"),
    "bias before norm": Layer(bias=True, norm="running", activation="leaky_relu"),
    "overlapping windows": Layer(pool=(3, 2, 1), size=(7, 6)),
    "windows apart": Layer(pool=(2, 3, 0), size=(8, 7), norm="batch"),
}


def check(got: Maps, truth: Maps, torchs: Maps, length: int) -> None:
    """Within twice the reference's own error in float32, and what the order of summation may take."""
    slack = SUMMATION_FACTOR * torch.finfo(torch.float32).eps * length**0.5
    reference, right = torchs.flat(), truth.flat()
    assert got.flat().keys() == right.keys()
    for name, value in got.flat().items():
        gap, allowed = distance(value, right[name]), 2 * distance(reference[name], right[name]) + slack
        assert gap <= allowed, f"{name} is off by {gap:.2e}, allowed {allowed:.2e}"


def on_reference(drawn: Drawn, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **options: bool) -> Maps:
    """The maps in plain PyTorch on a CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(ConvBlock, "backends", staticmethod(lambda device, dtype: [Backend("reference", True, "")]))
        return drawn.maps(dtype, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_the_reference_agrees_with_torch_func(name: str) -> None:
    drawn = Drawn(LAYERS[name])
    found, right = drawn.maps().flat(), drawn.truth().flat()
    assert found.keys() == right.keys()
    for key, value in found.items():
        assert distance(value, right[key]) <= FLOAT64_BOUND, key


@pytest.mark.parametrize("name", LAYERS)
def test_kernels_agree_with_float64(name: str, monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    drawn = Drawn(LAYERS[name], tasks=1 if name in ("grey", "plain") else 3 if name == "colour" else 2)
    torchs = on_reference(drawn, torch.float32, monkeypatch)
    check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, drawn.layer.length)


FIRST = {
    "colour": Layer(),
    "grey": Layer(channels=1, size=(7, 7), activation="leaky_relu", out=40),
    "without pooling": Layer(channels=1, stride=2, pool=None, norm="batch"),
    "overlapping windows": Layer(channels=2, pool=(2, 1, 1), size=(4, 5)),
    "bias before norm": Layer(channels=2, bias=True, norm="running", size=(5, 4)),
    "norm alone": Layer(channels=3, norm="affine", activation="identity", pool=None),
}


@pytest.mark.parametrize("shared", [(), NAMES[1:]], ids=["each task's parameters", "shared parameters"])
@pytest.mark.parametrize("name", FIRST)
def test_blocks_that_read_the_data(name: str, shared: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their input has neither tangent nor cotangent, and no image is kept."""
    drawn = Drawn(FIRST[name], moving=NAMES[1:], wanted=NAMES[1:], shared=shared, summed=bool(shared))
    assert drawn.op.geometry.shallow
    torchs = on_reference(drawn, torch.float32, monkeypatch)
    check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, drawn.layer.length)


def test_only_the_scale_of_a_block_that_reads_the_data_has_a_tangent(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in (NAMES[1:], ("scale",)):
        drawn = Drawn(FIRST["colour"], moving=("scale",), wanted=wanted)
        torchs = on_reference(drawn, torch.float32, monkeypatch)
        check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, drawn.layer.length)


@pytest.mark.parametrize("summed", [False, True], ids=["each task's", "summed"])
@pytest.mark.parametrize("name", ["bias before norm", "no norm"])
def test_shared_parameters(name: str, summed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(LAYERS[name], shared=(*NAMES[1:], "running_mean", "running_var"), summed=summed)
    reference = drawn.maps().flat()
    for key, value in drawn.truth().flat().items():
        assert distance(reference[key], value) <= FLOAT64_BOUND, key
    torchs = on_reference(drawn, torch.float32, monkeypatch)
    check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, drawn.layer.length)


@pytest.mark.parametrize("name", ["bias before norm", "no norm", "plain"])
def test_tangents_and_cotangents_that_are_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, where = LAYERS[name], device()
    for alone in Drawn(layer).differentiable:
        for first, second in ((True, True), (True, False), (False, True)):
            drawn = Drawn(layer, moving=(alone,))
            options = {"first": first, "second": second}
            truth, reference = drawn.truth(**options), drawn.maps(**options).flat()
            for key, value in truth.flat().items():
                assert distance(reference[key], value) <= FLOAT64_BOUND, (alone, key)
            torchs = on_reference(drawn, torch.float32, monkeypatch, **options)
            check(drawn.maps(torch.float32, where, **options), truth, torchs, layer.length)


@pytest.mark.parametrize("name", ["bias before norm", "no norm"])
def test_cotangents_asked_for_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in Drawn(LAYERS[name]).differentiable:
        drawn = Drawn(LAYERS[name], wanted=(wanted,))
        torchs = on_reference(drawn, torch.float32, monkeypatch)
        check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, drawn.layer.length)


@pytest.mark.parametrize("name", ["colour", "overlapping windows", "strided"])
def test_results_do_not_depend_on_the_order_of_programs(name: str) -> None:
    drawn = Drawn(LAYERS[name])
    once = drawn.maps(torch.float32, device()).flat()
    with reversed_programs():
        again = drawn.maps(torch.float32, device()).flat()
    assert all(torch.equal(again[key], value) for key, value in once.items())


def test_partial_sums_of_many_blocks(monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    """Small tiles stand for large images: sums are merged in groups, a weight's cotangent comes in pieces."""
    for name, size in (("ROWS", 16), ("FIRST_ROWS", 16), ("BLOCKS", 2), ("DEPTH", 16), ("SUMMED", 4), ("WHOLE", 4)):
        monkeypatch.setattr(tiles, name, size)
    layer = Layer(channels=2, out=5, size=(9, 16), images=1)
    for moving, tasks in ((NAMES, 1), (NAMES[1:], 2)):
        drawn = Drawn(layer, tasks, shared=("weight",), summed=True, moving=moving, wanted=moving)
        assert tiles.split(drawn.op.geometry, tasks)[1] > 1
        assert drawn.op.geometry.positions / tiles.ROWS > 4 * tiles.BLOCKS
        torchs = on_reference(drawn, torch.float32, monkeypatch)
        check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, layer.length)


def test_products_of_weights_in_two_parts(monkeypatch: pytest.MonkeyPatch, nan_poison: None) -> None:
    """As they are made on a GPU; the interpreter makes products in one part otherwise."""
    from fastmeta.ops.conv_block import triton as maps

    monkeypatch.setattr(maps, "build_precision", lambda: "tf32x3")
    layer = Layer(channels=4, out=5, size=(4, 5))
    drawn = Drawn(layer)
    assert tiles.weight_parts(drawn.op.geometry, "tf32x3") == 2
    torchs = on_reference(drawn, torch.float32, monkeypatch)
    check(drawn.maps(torch.float32, device()), drawn.truth(), torchs, layer.length)


def test_images_of_any_layout() -> None:
    drawn = Drawn(Layer(channels=3, out=5, size=(4, 5)))
    given = [drawn.x[name].to(device(), torch.float32) for name in drawn.names]
    y = drawn.op.forward(given)[0][0]
    last = given[0].movedim(2, -1).contiguous().movedim(-1, 2)
    wide = torch.stack([given[0], given[0]], -1)[..., 0]
    packed = torch.cat([given[1].flatten(1), given[1].flatten(1)], 1)[:, : given[1][0].numel()].view(given[1].shape)
    for x, weight in itertools.product((last, wide), (given[1], packed, given[1].mT.contiguous().mT)):
        assert torch.equal(drawn.op.forward([x, weight, *given[2:]])[0][0], y)
    assert y.movedim(2, -1).is_contiguous()


def test_the_precision_that_pytorch_is_asked_for() -> None:
    drawn = Drawn(Layer(channels=16, out=16, size=(4, 4)))
    right, errors = drawn.truth().y, {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            errors[precision] = distance(drawn.maps(torch.float32, device()).y, right)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert errors["highest"] <= 1e-5
    assert 1e-4 < errors["medium"] < 3e-2  # operands of eight bits, normalised to size one


def test_a_window_without_positive_values_passes_nothing_on() -> None:
    drawn = Drawn(Layer(norm="affine"))
    drawn.x["shift"] -= 100
    got = drawn.maps(torch.float32, device())
    assert not got.y.any()
    assert not any(value.any() for value in (*got.d.values(), *got.d_dot.values(), got.y_dot))


def test_nan_is_passed_on() -> None:
    drawn = Drawn(Layer(norm="none"))
    drawn.x["x"][0, 0, 0, 2, 2] = float("nan")
    y = drawn.maps(torch.float32, device()).y
    assert torch.isnan(y[0, 0]).any()
    assert not torch.isnan(y[0, 1:]).any()
    assert not torch.isnan(y[1]).any()


def test_no_tasks() -> None:
    drawn = Drawn(LAYERS["bias before norm"], shared=("weight",), summed=True)
    for of in (drawn.x, drawn.x_dot):
        of.update({name: value[:0] for name, value in of.items() if name != "weight"})
    drawn.x_dot["weight"], drawn.d, drawn.d_dot = drawn.x_dot["weight"][:0], drawn.d[:0], drawn.d_dot[:0]
    got = drawn.maps(torch.float32, device())
    assert got.y.shape == (0, *drawn.op.call.outputs[0].shape)
    assert got.d["weight"].shape == drawn.layer.weight().shape
    assert not got.d["weight"].any()
    assert not got.d_dot["weight"].any()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (Parts(Call.example(aten.conv2d.default, torch.zeros(2, 5, 5), torch.zeros(3, 2, 1, 1))), "without batch axis"),
        (
            Parts(Call.example(aten.conv2d.default, *map(torch.zeros, ((1, 4, 5, 5), (4, 2, 1, 1))), groups=2)),
            "groups or dilation",
        ),
        (
            Parts(Call.example(aten.conv2d.padding, *map(torch.zeros, ((1, 1, 5, 5), (1, 1, 2, 2))), padding="same")),
            "not symmetric",
        ),
        (
            Parts(
                Call.example(aten.conv2d.default, *(torch.zeros(s, dtype=torch.float64) for s in ((1, 1, 3, 3),) * 2))
            ),
            "torch.float32",
        ),
        (
            Parts(
                Layer().parts().convolution,
                activation=Call.example(aten.gelu.default, torch.zeros(2, 5, 6, 5)),
            ),
            "gelu",
        ),
        (
            Parts(
                Layer().parts().convolution,
                pool=Call.example(aten.max_pool2d.default, torch.zeros(2, 5, 6, 5), [2], [2], [0], [1], True),
            ),
            "ceil_mode",
        ),
        (
            Parts(
                Layer().parts().convolution,
                pool=Call.example(aten.max_pool2d.default, torch.zeros(2, 5, 16, 16), [12]),
            ),
            "large windows",
        ),
        (
            Parts(
                Layer().parts().convolution,
                norm=Call.example(
                    aten._native_batch_norm_legit_no_training.default,
                    *(torch.zeros(2, 5, 6, 5), *[torch.ones(5)] * 4, 0.1, 1e-5),
                ),
            ),
            "running statistics",
        ),
    ],
)
def test_what_is_refused(parts: Parts, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        ConvBlock.of(parts)


def test_paddings_by_name() -> None:
    x, weight = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 3, 3)
    for name, padding in (("same", (1, 1)), ("valid", (0, 0))):
        op = ConvBlock.of(Parts(Call.example(aten.conv2d.padding, x, weight, padding=name)))
        assert op.geometry.convolution.padding == padding

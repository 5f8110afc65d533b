"""The builds that few-shot networks ask for: their layers at the default precision, the widest at every other too.

Other channels, kernels and windows are built when they are first met; their tiles are of these sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastmeta.core.triton_support import PRECISIONS, Shipped
from fastmeta.ops.conv_block import tiles
from fastmeta.ops.conv_block import triton_first as first
from fastmeta.ops.conv_block import triton_norm as norm
from fastmeta.ops.conv_block import triton_products as products
from fastmeta.ops.conv_block.geometry import Geometry, Window

LAYERS = ((1, 64), (64, 64), (3, 32), (32, 32))  # channels of input and result: Omniglot, and 84x84 in colour
TASKS = 32
DEFAULT, WIDEST = "tf32x3", (64, 64)
FLOATS = ("slope", "eps", "momentum")


def builds() -> list[Shipped]:
    """Every build, each by a name of its own."""
    found = []
    for pair in LAYERS:
        layer = _layer(*pair)
        for precision in PRECISIONS.values():
            if precision == DEFAULT or pair == WIDEST:
                found += _products(layer, precision)
        packed = tiles.reordered(layer, 1)[1] | {"PARTS": tiles.weight_parts(layer, DEFAULT)}
        found += [_build(f"pack {_name(layer)}", products.pack, packed, ())]
        found += [_build(f"collect {_name(layer)}", products.collect, tiles.reordered(layer, 1)[1], ())]
    found += _products(_layer(64, 64, stride=2), DEFAULT) + _products(_layer(64, 64, size=3), DEFAULT)
    for wide in (64, 32):
        found += _passes(_layer(wide, wide))
    found += [_build("fold", norm.fold, {"BB": tiles.BLOCKS, "BC": 32}, ())]
    same: dict[Any, Shipped] = {}
    for one in found:
        same.setdefault((one.kernel, *sorted(one.constants.items(), key=str)), one)
    return list(same.values())


def _layer(channels: int, out: int, stride: int = 1, size: int = 28) -> Geometry:
    """A block; of its images only matters whether they are small."""
    window, sizes = Window((3, 3), (stride, stride), (1, 1)), (size, size)
    return Geometry(5, channels, sizes, out, window, sizes, Window((2, 2), (2, 2)), sizes, True, activation="relu")


def _name(g: Geometry) -> str:
    kind = " strided" if g.convolution.stride[0] > 1 else " small" if g.size[0] < 28 else ""
    return f"{g.channels}-{g.out}{kind}"


def _products(g: Geometry, precision: str) -> list[Shipped]:
    """The products of a layer's four maps."""
    if g.shallow:
        return _first(g, precision)
    name = f"{_name(g)} {precision}"
    plain, other = ("Bias", "Z", "Mean", "Rstd"), ("A2", "B2")
    rest = ("Bias", "Partial", "Z", "Mean", "Rstd")
    parts = tiles.weight_parts(g, precision)
    forward, transposed = (tiles.product_constants(g, TASKS, parts, transposed=turned) for turned in (False, True))

    def product(label: str, constants: dict[str, Any], missing: Sequence[str]) -> Shipped:
        side = g.size[0] * g.size[1] * g.images
        programs = TASKS * tiles.cdiv(side, tiles.ROWS) * tiles.cdiv(constants["CN"], constants["BN"])
        options = tiles.product_options(constants, programs)
        return _build(f"{label} {name}", products.product, constants | {"PRECISION": precision}, missing, options)

    def correlation(label: str, missing: Sequence[str]) -> Shipped:
        weight, options = tiles.correlation_constants(g) | _turned(precision), tiles.correlation_options(g)
        return _build(f"{label} {name}", products.correlation, weight, missing, options)

    return [
        product("forward", forward, (*plain, *other)),
        product("tangent", forward, ("Bias",)),
        correlation("weight cotangent", ("A2", "D2")),
        product("input cotangent", transposed, (*rest, *other)),
        product("input cotangent's tangent", transposed, rest),
        correlation("weight cotangent's tangent", ()),
    ]


def _first(g: Geometry, precision: str) -> list[Shipped]:
    """The maps of a block whose ``z`` is computed anew."""
    name, chosen, exact = f"{_name(g)} {precision}", {"PRECISION": precision}, _turned(DEFAULT)
    whole = tiles.first_constants(g, tiles.FIRST_ROWS, pooled=False) | chosen
    windows = tiles.windows_constants(g) | chosen | {"ACTIVATION": g.activation}
    maxima = tiles.maxima_constants(g) | _turned(precision) | {"EXACT": exact["PRECISION"]}
    covariance = tiles.covariance_constants(g) | exact
    dots, plain = ("WDot", "ScaleDot", "Moves"), ("WDot", "Mean", "Rstd", "Bias")
    of_windows, of_sums = tiles.windows_options(g), tiles.FEW_WARPS
    return [
        _build(f"first moments {name}", first.moments, whole, plain),
        _build(f"first moments' tangent {name}", first.moments, whole, ("Bias",)),
        _build(f"first windows {name}", first.windows, windows, (*dots, "Bias", "ShiftDot", "PeakDot"), of_windows),
        _build(f"first windows' tangent {name}", first.windows, windows, ("Bias", "Shift"), of_windows),
        _build(f"first covariance {name}", first.covariance, covariance, (), of_sums),
        _build(f"first weight cotangent {name}", first.correlation, maxima | {"Q": 2}, (*dots, "DDot"), of_sums),
        _build(f"first weight cotangent's tangent {name}", first.correlation, maxima | {"Q": 4}, (), of_sums),
    ]


def _turned(precision: str) -> dict[str, str]:
    """``triton_support.turned_precision`` on a GPU."""
    return {"PRECISION": "bf16x6" if precision == DEFAULT else precision}


def _passes(g: Geometry) -> list[Shipped]:
    """What follows the products, for normalised and pooled images."""
    elementwise = tiles.pool_constants(g) | tiles.elementwise(1, 1, g.out)[1]
    moments = {"C": g.out, "BB": tiles.BLOCKS, "BC": 32}
    few, many = ({"C": g.out, **tiles.sums(count, 1, g.out)[2]} for count in (tiles.WHOLE, 1 << 16))
    of_x = ("DDot", "PeakDot", "Moves")
    running = ("OldMean", "OldVar", "NewMean", "NewVar")
    dots = ("DDot", "ZDot", "ScaleDot", "Moves", "DZDot")
    return [
        _build(f"merge moments {g.out}", norm.merge_moments, moments, ()),
        _build(f"moments {g.out}", norm.finish_moments, moments, running),
        _build(f"moments, running statistics {g.out}", norm.finish_moments, moments, ()),
        _build(f"activate {g.out}", norm.activate, elementwise | {"ACTIVATION": g.activation}, ()),
        _build(f"activate's tangent {g.out}", norm.activate_tangent, elementwise, ()),
        _build(f"sums {g.out}", norm.window_sums, many | {"Q": 2}, of_x),
        _build(f"sums' tangents {g.out}", norm.window_sums, many | {"Q": 4}, ()),
        _build(f"sums of few {g.out}", norm.window_sums, few | {"Q": 2}, of_x),
        _build(f"sums' tangents of few {g.out}", norm.window_sums, few | {"Q": 4}, ()),
        _build(f"norm's cotangent {g.out}", norm.input_cotangent, elementwise | {"Q": 2}, dots),
        _build(f"norm's cotangent's tangent {g.out}", norm.input_cotangent, elementwise | {"Q": 4}, ()),
    ]


def _build(
    name: str, kernel: Any, constants: dict[str, Any], missing: Sequence[str], options: dict[str, Any] | None = None
) -> Shipped:
    """A build whose arguments ``missing`` are ``None``."""
    warps, stages = (4, 1) if options is None else (options["num_warps"], options["num_stages"])
    signature = {}
    for argument in kernel.arg_names:
        kind = "*fp32" if argument[0].isupper() else "i32"
        if argument in constants or argument in missing:
            kind = "constexpr"
        elif argument == "Code":
            kind = "*u8"
        elif argument in FLOATS:
            kind = "fp32"
        signature[argument] = kind
    constants = constants | dict.fromkeys(missing)
    return Shipped(f"conv_block {name}", kernel, signature, constants, warps, stages, "PRECISION" in constants)

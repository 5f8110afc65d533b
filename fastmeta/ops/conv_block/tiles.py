"""Tiles of the Triton kernels: fixed by shapes alone, so that a result is the same on every GPU and at every call."""

from __future__ import annotations

from typing import Any

from fastmeta.ops.conv_block.geometry import Geometry, Window

OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
ROWS = 64  # positions of a product's tile
FIRST_ROWS = 128  # likewise where ``z`` is computed anew for its moments
DEPTH = 32  # patch elements, or positions of a correlation, that are multiplied at a time
PROGRAMS = 1056  # that keep a large GPU busy: a correlation is split into so many, if its positions suffice
FIRST_PROGRAMS = 528  # likewise where ``z`` is computed anew
FEW = 132  # programs that leave a large GPU idle
SPLITS = 512  # at most
BLOCKS = 64  # rows of partial sums that one program adds up at a time
ELEMENTS = 2048  # of an elementwise program
WHOLE = 256  # windows that one program sums
SUMMED = 16  # windows that are summed at a time

Grid = tuple[int, int, int]


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def width(channels: int) -> int:
    """Channels of a tile."""
    return 64 if channels > 32 else 32


def _depth(channels: int, taps: int) -> int:
    """Patch elements of a tile: in one tap where channels are a multiple of them."""
    if channels % DEPTH and (channels % 16 == 0 or channels * taps <= 16):
        return 16
    return DEPTH


def _windows(window: Window) -> dict[str, int]:
    (kh, kw), (sh, sw), (ph, pw) = window.kernel, window.stride, window.padding
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}


def pool_constants(g: Geometry) -> dict[str, int]:
    """Channels and windows of the pooling."""
    return {"C": g.out, **_windows(g.pool)}


def product_constants(g: Geometry, tasks: int, parts: int, *, transposed: bool) -> dict[str, Any]:
    """What a build of the convolution or its transpose is made for, with a weight in one part or two."""
    ck, cn, size = (g.out, g.channels, g.size) if transposed else (g.channels, g.out, g.conv_size)
    wide = width(cn)
    if tasks * cdiv(g.images * size[0] * size[1], ROWS) * cdiv(cn, wide) < FEW:  # small images: more and narrower tiles
        wide = 32
    tile = {"BM": ROWS, "BN": wide, "BK": _depth(ck, g.convolution.taps), "PARTS": parts}
    return {"CK": ck, "CN": cn, **_windows(g.convolution), "TRANSPOSED": transposed, **tile}


def product_options(constants: dict[str, Any], programs: int) -> dict[str, Any]:
    """Warps and stages of that build: where many programs share a processor, each leaves room to the others.

    On an H100, us with 2 and 3 stages: 64 channels, 14x14, 512 programs 29 and 37; 7x7, 128 programs 17 and 13;
    32 channels, 42x42 165 and 154.
    """
    return OPTIONS | {"num_stages": 2 if constants["BN"] > 32 and programs > 2 * FEW else 3}


def correlation_constants(g: Geometry) -> dict[str, Any]:
    """What a build of the weight's cotangent is made for.

    On an H100, us: 64 channels, 14x14, 59 with tiles of 64 x 64 over 32 positions, 85 with 32 x 64. Over 64 positions
    it takes 52, but spills on a GPU before Hopper.
    """
    large = g.channels % 64 == 0 and g.out >= 64
    fine = 32 if g.channels % 32 == 0 else _depth(g.channels, g.convolution.taps)
    tile = {"BM": DEPTH, "BF": 64 if large else fine, "BN": width(g.out)}
    return {"CI": g.channels, "CO": g.out, **_windows(g.convolution), **tile}


def correlation_options(g: Geometry) -> dict[str, Any]:
    """Warps and stages of that build."""
    return OPTIONS | {"num_warps": 2 if width(g.out) < 64 else 4, "num_stages": 1}


def first_constants(g: Geometry, rows: int, *, pooled: bool) -> dict[str, Any]:
    """What a build of ``triton_first`` for tiles of so many rows is made for: with windows or without."""
    tile = {"BM": rows, "BC": width(g.out), "BK": _first_depth(g)}
    pool = {f"W{name.removeprefix('K')}": size for name, size in _windows(g.pool).items()} if pooled else {}
    return {"CI": g.channels, "C": g.out, **_windows(g.convolution), **pool, **tile}


def windows_constants(g: Geometry) -> dict[str, Any]:
    """What a build of its windows is made for: the operands of longer patches take more registers."""
    return first_constants(g, 32 if g.patch <= 16 else 16, pooled=True)


def windows_options(g: Geometry) -> dict[str, Any]:
    """Warps and stages of that build."""
    return OPTIONS | {"num_warps": 4 if g.patch <= 16 else 2, "num_stages": 1}


def covariance_constants(g: Geometry) -> dict[str, Any]:
    """What a build of the patches' covariance is made for."""
    return {"CI": g.channels, **_windows(g.convolution), "BM": DEPTH, "BK": _first_depth(g)}


def maxima_constants(g: Geometry) -> dict[str, Any]:
    """What a build of the weight's cotangent, where ``z`` is computed anew, is made for."""
    return first_constants(g, 16, pooled=True)


# Of that and of the covariance, whose tiles are small.
FEW_WARPS = OPTIONS | {"num_warps": 2, "num_stages": 1}


def _first_depth(g: Geometry) -> int:
    """Patch elements of a tile that holds whole patches."""
    return 16 if g.patch <= 16 else 32


def pieces(count: int, tasks: int, rows: int) -> tuple[int, int]:
    """Into how many pieces ``count`` windows or positions of a task are cut, and how many each has."""
    wanted = max(1, min(cdiv(FIRST_PROGRAMS, max(1, tasks)), cdiv(count, 4 * rows), SPLITS))
    span = cdiv(cdiv(count, wanted), rows) * rows
    return cdiv(count, span), span


def split(g: Geometry, tasks: int) -> tuple[int, int, int]:
    """Programs of a weight's cotangent for one task, into how many pieces positions are cut, and positions of each."""
    constants = correlation_constants(g)
    programs = cdiv(g.patch, constants["BF"]) * cdiv(g.out, constants["BN"])
    # Small tiles take less room, so that twice as many share a processor.
    wanted, least = (PROGRAMS, 4 * DEPTH) if constants["BF"] > 32 else (2 * PROGRAMS, 8 * DEPTH)
    most = min(cdiv(g.positions, least), SPLITS)
    pieces = max(1, min(cdiv(wanted, max(1, programs * tasks)), most))
    span = cdiv(cdiv(g.positions, pieces), constants["BM"]) * constants["BM"]
    return programs, cdiv(g.positions, span), span


def elementwise(positions: int, tasks: int, channels: int) -> tuple[Grid, dict[str, int]]:
    """Grid and tile of a pass over positions and channels."""
    wide = width(channels)
    tall = ELEMENTS // wide
    return (cdiv(positions, tall), tasks, cdiv(channels, wide)), {"BM": tall, "BC": wide}


def weight_parts(g: Geometry, precision: str) -> int:
    """In how many parts a weight is packed: in two where a product is made of three, and tiles are large."""
    return 2 if precision == "tf32x3" and not g.shallow else 1


def sums(windows: int, tasks: int, channels: int) -> tuple[Grid, int, dict[str, int]]:
    """Grid, windows of a program and tile of the sums over windows; one program sums a few windows whole."""
    if windows <= WHOLE:
        return (1, tasks, cdiv(channels, 32)), windows, {"BM": 4 * SUMMED, "BC": 32}
    span = cdiv(cdiv(windows, BLOCKS), SUMMED) * SUMMED
    wide = width(channels)
    return (cdiv(windows, span), tasks, cdiv(channels, wide)), span, {"BM": SUMMED, "BC": wide}


def reordered(g: Geometry, tasks: int) -> tuple[Grid, dict[str, int]]:
    """Grid and tile of a pass over a weight that changes its order."""
    tile = {"CI": g.channels, "CO": g.out, "TAPS": g.convolution.taps, "BQ": 32, "BO": 32}
    return (cdiv(g.patch, 32), cdiv(g.out, 32), tasks), tile

"""Pooling on a GPU: the maps of reference.py, each one kernel, with the size of its result beside their arguments.

Positions of maxima are int32 where nobody else reads them. A window without a pixel (a dilated one may reach over a
small image on both sides) has the maximum minus infinity, at a position past the plane.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fastmeta.core.triton_support import Shipped
from fastmeta.ops.pool import triton_kernels as kernels
from fastmeta.ops.pool.reference import Window, shell

ELEMENTS = 1024  # that a program reads at a time
WARPS = 4
CHANNELS = 64  # of a program, at the most
FEW = 16  # pixels of a window that are read one after the other


def maximum(
    x: Tensor,  # [B, C, H, W]
    window: Window,
    size: Sequence[int],  # h, w
    positions: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [B, C, h, w]
    """``y`` and ``i``, whose dtype is int32 or int64."""
    y = _result(x, size)
    i = torch.empty_like(y, dtype=positions)
    constants = _window(window) | {"DH": window.dilation[0], "DW": window.dilation[1]}
    _launch(kernels.maximum_kernel, (x, y, i), x, y, y, constants, _pixels(constants))
    return y, i


def maximum_tangent(x_dot: Tensor, i: Tensor) -> Tensor:
    """``y_dot = x_dot[i]``; zero where a window has no pixel."""
    y_dot = torch.empty_like(i, dtype=x_dot.dtype)
    _launch(kernels.maximum_tangent_kernel, (x_dot, i, y_dot), x_dot, y_dot, y_dot, {})
    return y_dot


def maximum_transpose(
    d: Tensor,  # [B, C, h, w]
    i: Tensor,  # [B, C, h, w]
    window: Window,
    size: Sequence[int],  # of x
) -> Tensor:  # [B, C, H, W]
    """``d_x``: each pixel adds up the cotangents of those windows whose maximum it is."""
    d_x = shell(d, size)
    _launch(kernels.maximum_transpose_kernel, (d, i, d_x), d_x, d, d_x, _steps(window) | _covering(window))
    return d_x


def average(
    x: Tensor,  # [B, C, H, W]
    window: Window,
    count_include_pad: bool,
    divisor: int | None,
    size: Sequence[int],  # h, w
) -> Tensor:  # [B, C, h, w]
    """Mean of every window."""
    return _average(x, _window(window) | _rule(count_include_pad, divisor), size)


def average_transpose(
    d: Tensor,  # [B, C, h, w]
    window: Window,
    count_include_pad: bool,
    divisor: int | None,
    size: Sequence[int],  # of x
) -> Tensor:  # [B, C, H, W]
    """``d_x``: each pixel adds up its shares of the windows that have it."""
    return _average_transpose(d, _window(window) | _rule(count_include_pad, divisor) | _covering(window), size)


def adaptive(x: Tensor, size: Sequence[int]) -> Tensor:
    """Mean of the windows that divide images ``[B, C, H, W]`` into ``size``."""
    return _average(x, _adaptive(x.shape[-2:], size), size)


def adaptive_transpose(d: Tensor, size: Sequence[int]) -> Tensor:
    """``d_x`` of :func:`adaptive`, where ``size`` is that of ``x``."""
    pixels, windows = size[-2:], d.shape[-2:]
    covering = {"NH": widest(windows[0], pixels[0]), "NW": widest(windows[1], pixels[1])}
    return _average_transpose(d, _adaptive(pixels, windows) | covering, size)


@functools.cache
def widest(pixels: int, windows: int) -> int:
    """The longest of the adaptive windows along an axis; turned round, the most windows that have one pixel."""
    return max((-(-(o + 1) * pixels // windows) - o * pixels // windows for o in range(windows)), default=0)


def _average(x: Tensor, constants: dict[str, int], size: Sequence[int]) -> Tensor:
    y = _result(x, size)
    _launch(kernels.average_kernel, (x, y), x, y, y, constants, _pixels(constants))
    return y


def _average_transpose(d: Tensor, constants: dict[str, int], size: Sequence[int]) -> Tensor:
    d_x = shell(d, size)
    _launch(kernels.average_transpose_kernel, (d, d_x), d_x, d, d_x, constants)
    return d_x


def _result(x: Tensor, size: Sequence[int]) -> Tensor:
    return shell(x, (*x.shape[:2], *size))


def _window(window: Window) -> dict[str, int]:
    return {"KH": window.kernel[0], "KW": window.kernel[1]} | _steps(window)


def _steps(window: Window) -> dict[str, int]:
    return dict(zip(("SH", "SW", "PH", "PW"), (*window.stride, *window.padding), strict=True))


def _covering(window: Window) -> dict[str, int]:
    """How many windows may have one pixel, along either axis."""
    most = [
        (kernel - 1) * dilation // stride + 1
        for kernel, stride, dilation in zip(window.kernel, window.stride, window.dilation, strict=True)
    ]
    return {"NH": most[0], "NW": most[1]}


def _rule(count_include_pad: bool, divisor: int | None) -> dict[str, int]:
    return {"ADAPTIVE": False, "COUNT_PAD": count_include_pad, "DIVISOR": divisor or 0}


def _adaptive(pixels: Sequence[int], windows: Sequence[int]) -> dict[str, int]:
    """Of windows that are all alike their bounds are known; of others each place divides anew."""
    even = all(most and not most % count for most, count in zip(pixels, windows, strict=True) if count)
    lengths = [widest(*axis) for axis in zip(pixels, windows, strict=True)]
    constants = _window(Window(lengths, lengths, (0, 0))) | _rule(count_include_pad=False, divisor=None)
    return constants | {"ADAPTIVE": not even}


def _pixels(constants: dict[str, int]) -> int:
    return constants["KH"] * constants["KW"]


def _launch(
    kernel: Any,
    tensors: Sequence[Tensor],
    image: Tensor,  # [B, C, H, W]
    pooled: Tensor,  # [B, C, h, w]
    result: Tensor,  # one of the two
    constants: dict[str, int],
    pixels: int | None = None,
) -> None:
    """One kernel over a result; ``pixels`` of a window where it looks at whole windows."""
    if result.numel():
        channels = result.shape[1]
        places = result.numel() // channels
        sizes = _tiles(places, channels, pixels)
        grid = triton.cdiv(places, sizes["BM"]), triton.cdiv(channels, sizes["BC"])
        kernel[grid](
            *tensors, places, *image.shape[-2:], *pooled.shape[-2:], channels, **constants, **sizes,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


def _tiles(places: int, channels: int, pixels: int | None) -> dict[str, int]:
    """Places and channels of a program; of windows, pixels that are read at a time: the more, the larger they are."""
    lanes = 1 if pixels is None or pixels <= FEW else 32 if pixels <= 1024 else 128
    wide = min(triton.next_power_of_2(channels), CHANNELS, ELEMENTS // lanes)
    block = max(1, min(triton.next_power_of_2(places), ELEMENTS // (lanes * wide)))
    return {"BM": block, "BC": wide} | ({} if pixels is None else {"BK": lanes})


def shipped() -> list[Shipped]:
    """Builds for common windows, for a whole plane, and for one that is divided unevenly."""
    many = 1 << 16
    builds = []
    for name, window, channels, positions in (
        ("2x2", Window((2, 2), (2, 2), (0, 0)), 64, "*i32"),
        ("3x3 that overlap, with indices", Window((3, 3), (2, 2), (1, 1)), 64, "*i64"),
        ("5x5 that overlap", Window((5, 5), (1, 1), (2, 2)), 64, "*i32"),
        ("5x5 that overlap, one channel", Window((5, 5), (1, 1), (2, 2)), 1, "*i32"),
    ):
        own, covering, steps = _window(window), _covering(window), _steps(window)
        rule = _rule(count_include_pad=True, divisor=None)
        one = {"C": 1} if channels == 1 else {}  # Triton makes a build of its own for a one
        few, whole = _tiles(many, channels, None) | one, _tiles(many, channels, _pixels(own)) | one
        for label, kernel, constants in (
            ("max pool", kernels.maximum_kernel, own | {"DH": 1, "DW": 1} | whole),
            ("max pool tangent", kernels.maximum_tangent_kernel, few),
            ("max pool transpose", kernels.maximum_transpose_kernel, steps | covering | few),
            ("average pool", kernels.average_kernel, own | rule | whole),
            ("average pool transpose", kernels.average_transpose_kernel, own | rule | covering | few),
        ):
            builds.append(_build(f"{label} {name}", kernel, constants, positions))
    for pixels, windows in ((21, 1), (84, 1), (13, 6)):
        own = _adaptive((pixels, pixels), (windows, windows))
        most = dict.fromkeys(("NH", "NW"), widest(windows, pixels))
        few, whole = _tiles(many, 64, None), _tiles(many, 64, _pixels(own))
        one = {"h": 1, "w": 1} if windows == 1 else {}
        name = f"{pixels}x{pixels} to {windows}x{windows}"
        transposed = own | most | few | one
        builds += [
            _build(f"adaptive average pool {name}", kernels.average_kernel, own | whole | one),
            _build(f"adaptive average pool transpose {name}", kernels.average_transpose_kernel, transposed),
        ]
    return builds


def _build(label: str, kernel: triton.JITFunction, constants: dict[str, int], positions: str = "*i32") -> Shipped:
    types = dict.fromkeys(("x", "y", "x_dot", "y_dot", "d", "d_x"), "*fp32") | {"i": positions}
    types |= dict.fromkeys(("M", "H", "W", "h", "w", "C"), "i32") | dict.fromkeys(constants, "constexpr")
    return Shipped(label, kernel, {n: types[n] for n in kernel.arg_names}, constants, WARPS, 1)

"""Softmax and log-softmax along the last axis on a GPU: one kernel a map, which reads a row once.

The formulas are reference.py's. A row stays in registers, and narrow rows share a program. As in PyTorch, a row whose
maximum is infinite, or which has a NaN, is NaN throughout.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_support import Shipped

ELEMENTS = 1024  # of the narrow rows of one program
DERIVATIVE, LOG_BACKWARD, LOG_TANGENT = 0, 1, 2  # the linear maps


@triton.jit
def _total(x):
    return tl.sum(x, 1)[:, None]


@triton.jit
def _places(R, C, BR: tl.constexpr, BC: tl.constexpr):
    """A program's first element, distances of its elements from there, and which of them there are."""
    first = tl.program_id(0).to(tl.int64) * BR
    row, c = tl.arange(0, BR), tl.arange(0, BC)
    inside = (first + row < R)[:, None] & (c < C)[None, :]
    return first * C, row[:, None] * C + c[None, :], inside


@triton.jit
def forward_kernel(
    x, p, y,  # [R, C] each; y is log p
    R, C,
    LOG: tl.constexpr,  # y is written
    BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    base, at, inside = _places(R, C, BR, BC)
    value = tl.load(x + base + at, inside, -float("inf"))
    value -= tl.max(value, 1)[:, None]
    e = tl.exp(value)
    whole = _total(e)
    tl.store(p + base + at, e / whole, inside)
    if LOG:
        tl.store(y + base + at, value - tl.log(whole), inside)


@triton.jit
def linear_kernel(
    p, v, out,  # [R, C] each
    R, C,
    MAP: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    base, at, inside = _places(R, C, BR, BC)
    share = tl.load(p + base + at, inside, 0.0)
    value = tl.load(v + base + at, inside, 0.0)
    if MAP == 1:
        value -= share * _total(value)
    else:
        value -= _total(share * value)
        if MAP == 0:
            value *= share
    tl.store(out + base + at, value, inside)


@triton.jit
def bent_kernel(
    p, y_dot, d, d_dot, d_x_dot,  # [R, C] each
    R, C,
    LOG: tl.constexpr,
    STRAIGHT: tl.constexpr,  # d_dot is read
    BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    base, at, inside = _places(R, C, BR, BC)
    share = tl.load(p + base + at, inside, 0.0)
    moved = tl.load(y_dot + base + at, inside, 0.0)
    cotangent = tl.load(d + base + at, inside, 0.0)
    if STRAIGHT:
        change = tl.load(d_dot + base + at, inside, 0.0)
    if LOG:
        result = -share * moved * _total(cotangent)
        if STRAIGHT:
            result += change - share * _total(change)
    else:
        result = moved * (cotangent - _total(share * cotangent))
        if STRAIGHT:
            result += share * (change - _total(share * change + moved * cotangent))
        else:
            result -= share * _total(moved * cotangent)
    tl.store(d_x_dot + base + at, result, inside)


def forward(x: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    """``p``, and ``y``: ``log p`` or ``p`` itself."""
    x = x.contiguous()
    p = torch.empty_like(x)
    y = torch.empty_like(x) if log else p
    _launch(forward_kernel, x, p, y, LOG=log)
    return p, y


def linear(p: Tensor, v: Tensor, which: int) -> Tensor:
    """``DERIVATIVE``, ``LOG_BACKWARD`` or ``LOG_TANGENT`` of ``v``."""
    out = torch.empty_like(p)
    _launch(linear_kernel, p, v.contiguous(), out, MAP=which)
    return out


def bent(p: Tensor, y_dot: Tensor, d: Tensor, d_dot: Tensor | None, log: bool) -> Tensor:
    """``d_x_dot``; of log-softmax where ``log``. Without ``d_dot`` its second-order part alone."""
    d, out = d.contiguous(), torch.empty_like(p)
    change = d if d_dot is None else d_dot.contiguous()
    _launch(bent_kernel, p, y_dot, d, change, out, LOG=log, STRAIGHT=d_dot is not None)
    return out


def _launch(kernel: Any, *tensors: Tensor, **constants: int) -> None:
    """One kernel over the rows of tensors of one shape."""
    width = tensors[0].shape[-1]
    rows = tensors[0].numel() // width
    if rows:
        sizes = _sizes(rows, width)
        warps = sizes.pop("warps")
        kernel[(triton.cdiv(rows, sizes["BR"]),)](
            *tensors, rows, width, **constants, **sizes, num_warps=warps, num_stages=1, enable_fp_fusion=True
        )


def _sizes(rows: int, width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(rows), ELEMENTS // wide))
    return {"BR": block, "BC": wide, "warps": 8 if wide > ELEMENTS else 4}


def shipped() -> list[Shipped]:
    """Builds for few scores, for a transformer's, and for the widest rows."""
    builds = []
    for width in (20, 512, 8192):
        sizes = _sizes(1 << 16, width)
        warps = sizes.pop("warps")
        for name, kernel, more in (
            ("softmax forward", forward_kernel, {"LOG": False}),
            ("log-softmax forward", forward_kernel, {"LOG": True}),
            ("softmax derivative", linear_kernel, {"MAP": DERIVATIVE}),
            ("log-softmax backward", linear_kernel, {"MAP": LOG_BACKWARD}),
            ("log-softmax tangent", linear_kernel, {"MAP": LOG_TANGENT}),
            ("softmax tangent-backward", bent_kernel, {"LOG": False, "STRAIGHT": True}),
            ("log-softmax tangent-backward", bent_kernel, {"LOG": True, "STRAIGHT": True}),
        ):
            constants = {**more, **sizes}
            types = {"R": "i32", "C": "i32"} | dict.fromkeys(constants, "constexpr")
            signature = {n: types.get(n, "*fp32") for n in kernel.arg_names}
            builds.append(Shipped(f"{name}, rows of {width}", kernel, signature, constants, warps, 1))
    return builds

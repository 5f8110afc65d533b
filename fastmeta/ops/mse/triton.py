"""Mean squared error on a GPU: a map is one pass over a task's elements.

The formulas are reference.py's, of a loss that is reduced. A program adds up at most ``SPAN`` elements of a task, and
the sums of a task's programs are added up in their order, so that the same call gives the same loss every time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_support import Shipped
from fastmeta.ops.mse.reference import MEAN

BLOCK = 1024  # elements that a program handles at a time
SPAN = 16 * BLOCK  # that it adds up
WARPS = 4


@triton.jit
def forward_kernel(
    x, y, partial, e,  # [T, N], [T, N], [T, P], [T, N]
    x_task, y_task,  # distances between tasks
    N, scale,
    B: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * SPAN
    total = tl.zeros((B,), tl.float32)
    for start in range(begin, min(begin + SPAN, N), B):
        n = start + tl.arange(0, B)
        difference = tl.load(x + task * x_task + n, n < N, 0.0) - tl.load(y + task * y_task + n, n < N, 0.0)
        total += difference * difference
        tl.store(e + task * N + n, difference, n < N)
    tl.store(partial + task * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0) * scale)


@triton.jit
def tangent_kernel(
    e, x_dot, y_dot, partial, e_dot,  # [T, N], [T, N], [T, N], [T, P], [T, N]
    x_task, y_task,
    N, scale,
    INPUT: tl.constexpr,  # x_dot is read
    TARGET: tl.constexpr,  # y_dot is read, and e_dot written
    B: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * SPAN
    total = tl.zeros((B,), tl.float32)
    for start in range(begin, min(begin + SPAN, N), B):
        n = start + tl.arange(0, B)
        moved = tl.zeros((B,), tl.float32)
        if INPUT:
            moved = tl.load(x_dot + task * x_task + n, n < N, 0.0)
        if TARGET:
            moved -= tl.load(y_dot + task * y_task + n, n < N, 0.0)
            tl.store(e_dot + task * N + n, moved, n < N)
        total += tl.load(e + task * N + n, n < N, 0.0) * moved
    tl.store(partial + task * tl.num_programs(0) + tl.program_id(0), tl.sum(total, 0) * scale)


@triton.jit
def cotangents_kernel(
    e, e_dot, d_l, d_l_dot,  # [T, N], [T, N], [T], [T]
    d_x, d_y,  # [T, N]: the cotangents, or their tangents
    e_dot_task, d_l_task, d_l_dot_task,
    N, scale,
    STRAIGHT: tl.constexpr,  # d_l_dot is read
    BENT: tl.constexpr,  # e_dot and d_l are read
    WANT_X: tl.constexpr,
    WANT_Y: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros((B,), tl.float32)
    if STRAIGHT:
        total = tl.load(e + task * N + n, n < N, 0.0) * (tl.load(d_l_dot + task * d_l_dot_task) * scale)
    if BENT:
        total += tl.load(e_dot + task * e_dot_task + n, n < N, 0.0) * (tl.load(d_l + task * d_l_task) * scale)
    if WANT_X:
        tl.store(d_x + task * N + n, total, n < N)
    if WANT_Y:
        tl.store(d_y + task * N + n, -total, n < N)


def forward(x: Tensor, y: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """The loss ``[T]``, ``MEAN`` or ``SUM`` over a task's elements, and ``e`` of the shape of ``x``, ``[T, ...]``.

    The mean of no elements is NaN, as in PyTorch.
    """
    shape, x, y = x.shape, _elements(x), _elements(y)
    tasks, count = x.shape
    e = x.new_empty(tasks, count)
    scale = 1.0 if reduction != MEAN else 1.0 / count if count else float("nan")
    partial = _partial(e)
    forward_kernel[partial.shape[1], tasks](
        x, y, partial, e, x.stride(0), y.stride(0), count, scale,
        B=_block(count), SPAN=SPAN, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return _added(partial), e.view(shape)


def tangent(e: Tensor, x_dot: Tensor | None, y_dot: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``l_dot`` ``[T]`` and ``e_dot``, of the shape of ``e``; ``e_dot`` is ``x_dot`` itself without ``y_dot``.

    ``s`` is 1 / N for the mean. Some tangent is given.
    """
    shape, e = e.shape, _elements(e)
    x_dot, y_dot = (None if v is None else _elements(v) for v in (x_dot, y_dot))
    e_dot = None if y_dot is None else torch.empty_like(e)
    partial = _partial(e)
    tangent_kernel[partial.shape[1], len(e)](
        *(e if v is None else v for v in (e, x_dot, y_dot, partial, e_dot)),
        *(0 if v is None else v.stride(0) for v in (x_dot, y_dot)), e.shape[1], 2 * scale,
        INPUT=x_dot is not None, TARGET=y_dot is not None,
        B=_block(e.shape[1]), SPAN=SPAN, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    moved = x_dot if e_dot is None else e_dot
    return _added(partial), moved.view(shape)  # type: ignore[union-attr]


def cotangents(
    e: Tensor,  # [T, ...]
    e_dot: Tensor | None,  # [T, ...]
    d_l: Tensor | None,  # [T]
    d_l_dot: Tensor | None,  # [T]
    scale: float,
    want_x: bool,
    want_y: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``d_x_dot`` and ``d_y_dot``, of the shape of ``e``, those that are wanted.

    Without ``e_dot`` the cotangents ``d_x`` and ``d_y`` themselves for one ``d_l_dot``. Either that, or ``e_dot`` and
    ``d_l``, is given.
    """
    shape, e = e.shape, _elements(e)
    e_dot = None if e_dot is None else _elements(e_dot)
    d_x, d_y = (torch.empty_like(e) if wanted else None for wanted in (want_x, want_y))
    tasks, count = e.shape
    block = _block(count)
    cotangents_kernel[triton.cdiv(count, block), tasks](
        *(e if v is None else v for v in (e, e_dot, d_l, d_l_dot, d_x, d_y)),
        *(0 if v is None else v.stride(0) for v in (e_dot, d_l, d_l_dot)), count, 2 * scale,
        STRAIGHT=d_l_dot is not None, BENT=d_l is not None and e_dot is not None, WANT_X=want_x, WANT_Y=want_y,
        B=block, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return None if d_x is None else d_x.view(shape), None if d_y is None else d_y.view(shape)


def _elements(value: Tensor) -> Tensor:
    """``[T, ...]`` as ``[T, N]``, a task's elements side by side; tasks may lie anywhere, or all be one."""
    flat = value.reshape(value.shape[0], value[:1].numel())
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _partial(e: Tensor) -> Tensor:
    """The sum of each program, to be written, ``[T, P]``."""
    return e.new_empty(len(e), max(1, triton.cdiv(e.shape[1], SPAN)))


def _added(partial: Tensor) -> Tensor:
    return partial.squeeze(1) if partial.shape[1] == 1 else partial.sum(1)


def _block(count: int) -> int:
    return max(1, min(triton.next_power_of_2(count), BLOCK))


def shipped() -> list[Shipped]:
    """Builds for a regression on few points and for images."""
    pointers = ("x", "y", "partial", "e", "x_dot", "y_dot", "e_dot", "d_l", "d_l_dot", "d_x", "d_y")
    tasks = ("x_task", "y_task", "e_dot_task", "d_l_task", "d_l_dot_task", "N")
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(tasks, "i32") | {"scale": "fp32"}
    kernels = {"forward": forward_kernel, "tangent": tangent_kernel, "cotangents": cotangents_kernel}
    builds = []
    for block in (16, BLOCK):
        for name, kernel in kernels.items():
            sizes = {"B": block, "SPAN": SPAN}
            constants = {n: sizes.get(n, True) for n in kernel.arg_names if n not in types}
            signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
            builds.append(Shipped(f"mse {name}, blocks of {block}", kernel, signature, constants, WARPS, 1))
    return builds

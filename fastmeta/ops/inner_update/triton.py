"""Kernels of the inner step and its adjoint on a GPU: float32, not differentiable by themselves.

Rows may lie any distance apart, zero included; the elements of a row must be contiguous. Sums over tasks are in the
order of the tasks, whatever the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_support import Shipped

BLOCK = 1024  # elements of a program: four of 16 bytes a thread
WARPS = 4
SCALAR, SEGMENT, ELEMENT = 0, 1, 2
MOST_PARTS = 16  # of a launch


@triton.jit
def _rates(alpha, segments, p, P, S, KIND: tl.constexpr, DEPTH: tl.constexpr):
    """``alpha[a(p)]``, for one rate, one a segment, or one an element."""
    if KIND == 0:
        return tl.load(alpha)
    elif KIND == 2:
        return tl.load(alpha + p, p < P, 0.0)
    else:
        low = tl.zeros(p.shape, tl.int32)  # the last segment that begins at p or before
        high = low + (S - 1)
        for _ in tl.static_range(DEPTH):
            middle = (low + high + 1) // 2
            before = tl.load(segments + middle) <= p
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        return tl.load(alpha + low)


@triton.jit
def step_kernel(
    theta, g, alpha, segments, out,
    theta_row, g_row, out_row,
    P, S,
    KIND: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE: tl.constexpr,  # alone: out = alpha g
    BLOCK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    change = _rates(alpha, segments, p, P, S, KIND, DEPTH) * tl.load(g + task * g_row + p, mask, 0.0)
    if SCALE:
        tl.store(out + task * out_row + p, change, mask)
    else:
        tl.store(out + task * out_row + p, tl.load(theta + task * theta_row + p, mask, 0.0) - change, mask)


@triton.jit
def parts_kernel(
    theta, parts, alpha, out,  # parts: one [T, n] a tensor
    theta_row, out_row,
    sizes,  # n of each
    before,  # elements of a row that lie before the first part
    first,  # number of the first part
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A step, or with ``alpha`` ``None`` ``theta - g``, where each tensor's gradient lies by itself."""
    block = tl.program_id(0)
    task = tl.program_id(1).to(tl.int64)
    for i in tl.static_range(len(parts)):
        size = sizes[i]
        blocks = tl.cdiv(size, BLOCK)
        if (block >= 0) & (block < blocks):
            q = block * BLOCK + tl.arange(0, BLOCK)
            mask = q < size
            p = before + q
            change = tl.load(parts[i] + task * size + q, mask, 0.0)
            if alpha is not None:
                if KIND == 0:
                    change *= tl.load(alpha)
                elif KIND == 1:
                    change *= tl.load(alpha + first + i)
                else:
                    change *= tl.load(alpha + p, mask, 0.0)
            tl.store(out + task * out_row + p, tl.load(theta + task * theta_row + p, mask, 0.0) - change, mask)
        block -= blocks
        before += size


@triton.jit
def products_kernel(lam, g, out, lam_row, g_row, T, P, BLOCK: tl.constexpr):
    """``out[p] = -sum_t g[t, p] lam[t, p]``."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < P
    total = tl.zeros((BLOCK,), tl.float32)
    left, right = g + p, lam + p
    for _ in range(0, T):
        total += tl.load(left, mask, 0.0) * tl.load(right, mask, 0.0)
        left += g_row
        right += lam_row
    tl.store(out + p, -total, mask)


def step(
    theta: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    *,
    out: Tensor | None = None,  # [T, P]
) -> Tensor:  # [T, P]
    """Eq. (3) into ``out``, or into a new tensor."""
    result = torch.empty_like(g, memory_format=torch.contiguous_format) if out is None else out
    _launch(theta, g, alpha, segments, result, scale=False)
    return result


def step_parts(
    theta: Tensor,  # [T, P]
    parts: Sequence[Tensor],  # [T, n] each, P elements a task in all
    alpha: Tensor | None = None,  # [] or [1], [S], [P]; 1 where left out
    segments: Tensor | None = None,  # int64 [S + 1]: that alpha has a rate for each part
    *,
    out: Tensor,  # [T, P]; may be theta
) -> Tensor:  # [T, P]
    """Eq. (3) into ``out``, of gradients that lie by themselves: they need not be copied together first."""
    kind = SCALAR if alpha is None else _kind(alpha, segments, theta.shape[1])[0]
    before = 0
    for first in range(0, len(parts), MOST_PARTS):
        some = tuple(part.contiguous() for part in parts[first : first + MOST_PARTS])
        sizes = tuple(part.shape[1] for part in some)
        grid = (sum(triton.cdiv(size, BLOCK) for size in sizes), theta.shape[0])
        if sum(sizes) and theta.shape[0]:
            parts_kernel[grid](
                theta, some, alpha, out, theta.stride(0), out.stride(0), sizes, before, first,
                KIND=kind, BLOCK=BLOCK, num_warps=WARPS, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
        before += sum(sizes)
    return out


def adjoint(
    lam: Tensor,  # [T, P]
    g: Tensor,  # [T, P]
    alpha: Tensor,  # [] or [1], [S], [P]
    segments: Tensor | None = None,  # int64 [S + 1]
    need_alpha: bool = True,
) -> tuple[Tensor, Tensor | None]:  # [T, P], alpha's shape
    """Eq. (5) and, where ``need_alpha``, eq. (7)."""
    u = torch.empty_like(lam, memory_format=torch.contiguous_format)
    _launch(lam, lam, alpha, segments, u, scale=True)
    if not need_alpha:
        return u, None
    tasks, elements = g.shape
    products = g.new_empty(elements)
    if g.numel():
        grid = (triton.cdiv(elements, BLOCK),)
        products_kernel[grid](
            lam, g, products, lam.stride(0), g.stride(0), tasks, elements, BLOCK=BLOCK,
            num_warps=WARPS, num_stages=2, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        products.zero_()
    kind, _ = _kind(alpha, segments, elements)
    if kind == ELEMENT:
        return u, products.reshape(alpha.shape)
    if kind == SEGMENT and segments is not None:
        return u, torch.segment_reduce(products, "sum", lengths=segments.to(g.device).diff(), unsafe=True)
    return u, products.sum().reshape(alpha.shape)


def _launch(theta: Tensor, g: Tensor, alpha: Tensor, segments: Tensor | None, out: Tensor, *, scale: bool) -> None:
    tasks, elements = g.shape
    if g.numel() == 0:
        return
    kind, count = _kind(alpha, segments, elements)
    segments = alpha if segments is None else segments.to(g.device)
    grid = (triton.cdiv(elements, BLOCK), tasks)
    step_kernel[grid](
        theta, g, alpha, segments, out, theta.stride(0), g.stride(0), out.stride(0),
        elements, count, KIND=kind, DEPTH=max(count - 1, 0).bit_length(), SCALE=scale, BLOCK=BLOCK,
        num_warps=WARPS, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip


def _kind(alpha: Tensor, segments: Tensor | None, elements: int) -> tuple[int, int]:
    """How ``alpha`` is spread, and the number of segments."""
    if segments is not None and alpha.dim() == 1 and alpha.shape[0] == segments.shape[0] - 1:
        return SEGMENT, segments.shape[0] - 1
    return (SCALAR, 0) if alpha.numel() == 1 else (ELEMENT, 0)


def shipped() -> list[Shipped]:
    """One build for each way that rates are spread, and the sums."""
    builds = []
    signature: dict[str, Any]
    pointers = dict.fromkeys(("theta", "g", "alpha", "out"), "*fp32") | {"segments": "*i64"}
    numbers = dict.fromkeys(("theta_row", "g_row", "out_row", "P", "S"), "i32")
    for name, kind, depth in (("one rate", SCALAR, 0), ("one a tensor", SEGMENT, 4), ("one an element", ELEMENT, 0)):
        constants = {"KIND": kind, "DEPTH": depth, "SCALE": False, "BLOCK": BLOCK}
        signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
        builds.append(Shipped(f"inner_update step, {name}", step_kernel, signature, constants, WARPS, 2))
    constants = {"KIND": SCALAR, "BLOCK": BLOCK}
    signature = {"theta": "*fp32", "parts": ("*fp32",) * 6, "alpha": "*fp32", "out": "*fp32", "theta_row": "i32"}
    signature |= {"out_row": "i32", "sizes": ("i32",) * 6, "before": "i32", "first": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    builds.append(Shipped("inner_update step of six parts", parts_kernel, signature, constants, WARPS, 2))
    signature = dict.fromkeys(("lam", "g", "out"), "*fp32") | dict.fromkeys(("lam_row", "g_row", "T", "P"), "i32")
    signature |= {"BLOCK": "constexpr"}
    return [*builds, Shipped("inner_update products", products_kernel, signature, {"BLOCK": BLOCK}, WARPS, 2)]

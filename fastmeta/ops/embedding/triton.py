"""Rows of a table by index on a GPU, and the table's cotangent without atomic operations.

A row of the table's cotangent is the sum of the rows of all positions that name it. One program adds them up, always in
the same order: that of the first such position. In a list of at most ``LONGEST`` positions each looks for itself
whether another one comes before it; a longer list is sorted first, and the positions that name a row lie side by side.

An index out of range makes its row NaN, and adds nothing to the cotangent.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmeta.core.triton_support import Shipped

LONGEST = 4096  # positions of a list that is not sorted: comparisons grow with its square
SEARCHED = 512  # of which a program looks at so many at a time for an earlier one
TILE = 2048  # elements of the rows that a program handles at a time
COLUMNS = 64  # of them
WARPS = 4


@triton.jit
def rows_kernel(
    table, indices, y,  # [V, D] or [T, V, D], [T, R], [T, R, D]
    table_task, table_row, indices_task,  # distances between tasks and between rows
    R, D, V,
    BR: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    index = tl.load(indices + task * indices_task + r, r < R, -1).to(tl.int64)
    there = (index >= 0) & (index < V)
    place = task * table_task + index[:, None] * table_row + c[None, :]
    value = tl.load(table + place, there[:, None] & (c < D)[None, :], float("nan"))
    tl.store(y + (task * R + r[:, None]) * D + c[None, :], value, (r < R)[:, None] & (c < D)[None, :])


@triton.jit
def searched_kernel(
    d, indices, total,  # [G, R, D], [G, R], [G, V, D]
    R, D, V, padding,
    SEARCHED: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    indices += group * R
    own = tl.load(indices + r).to(tl.int64)
    idle = ((own < 0) | (own >= V) | (own == padding)).to(tl.int32)
    begin = 0
    while (begin < r) & (idle == 0):
        p = begin + tl.arange(0, SEARCHED)
        idle = tl.max((tl.load(indices + p, p < r, -1) == own).to(tl.int32), 0)
        begin += SEARCHED
    if idle == 0:
        tile = tl.zeros((BR, BD), tl.float32)
        for start in range(r, R, BR):
            p = start + tl.arange(0, BR)
            same = tl.load(indices + p, p < R, -1) == own
            if tl.max(same.to(tl.int32), 0) > 0:
                tile += tl.load(d + (group * R + p[:, None]) * D + c[None, :], same[:, None] & (c < D)[None, :], 0.0)
        tl.store(total + (group * V + own) * D + c, tl.sum(tile, 0), c < D)


@triton.jit
def sorted_kernel(
    d, ordered, order, total,  # [G, R, D], [G, R], [G, R], [G, V, D]
    R, D, V, padding,
    BR: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    ordered += group * R
    order += group * R
    own = tl.load(ordered + r).to(tl.int64)
    before = tl.load(ordered + r - 1, r > 0, -1)
    if (own >= 0) & (own < V) & (own != padding) & (own != before):
        tile = tl.zeros((BR, BD), tl.float32)
        start = r
        more = 1
        while more > 0:
            p = start + tl.arange(0, BR)
            same = tl.load(ordered + p, p < R, -1) == own
            row = tl.load(order + p, same, 0)
            tile += tl.load(d + (group * R + row[:, None]) * D + c[None, :], same[:, None] & (c < D)[None, :], 0.0)
            more = tl.min(same.to(tl.int32), 0)
            start += BR
        tl.store(total + (group * V + own) * D + c, tl.sum(tile, 0), c < D)


def rows(table: Tensor, indices: Tensor) -> Tensor:
    """``W[i]``, ``[T, R, D]``, of a table ``[V, D]`` or ``[T, V, D]`` and indices ``[T, R]``, int32 or int64.

    NaN where an index is not in ``[0, V)``.
    """
    table = table if table.stride(-1) == 1 else table.contiguous()
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    (tasks, count), (size, width) = indices.shape, table.shape[-2:]
    y = table.new_empty(tasks, count, width)
    sizes = _sizes(width)
    rows_kernel[triton.cdiv(count, sizes["BR"]), triton.cdiv(width, sizes["BD"]), tasks](
        table, indices, y, table.stride(0) if table.dim() == 3 else 0, table.stride(-2), indices.stride(0),
        count, width, size, **sizes, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def table_cotangent(d: Tensor, indices: Tensor, size: int, padding: int, shared: bool) -> Tensor:
    """Sum of the rows ``d`` ``[T, R, D]`` at each index, of ``[T, R]``: ``[T, V, D]``, or over tasks too, ``[V, D]``.

    The row ``padding`` gets none, and an index that is not in ``[0, V)`` adds nothing.
    """
    width = d.shape[2]
    if shared:
        d, indices = d.reshape(1, -1, width), indices.reshape(1, -1)
    d = d.contiguous()
    groups, count = indices.shape
    total = d.new_zeros(groups, size, width)
    sizes = _sizes(width)
    grid = count, triton.cdiv(width, sizes["BD"]), groups
    if count > LONGEST:
        ordered, order = indices.sort(dim=1, stable=True)
        sorted_kernel[grid](
            d, ordered.contiguous(), order.contiguous(), total, count, width, size, padding, **sizes,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        searched_kernel[grid](
            d, indices.contiguous(), total, count, width, size, padding, SEARCHED=SEARCHED, **sizes,
            num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return total[0] if shared else total


def _sizes(width: int) -> dict[str, int]:
    columns = max(1, min(triton.next_power_of_2(width), COLUMNS))
    return {"BR": TILE // columns, "BD": columns}


def shipped() -> list[Shipped]:
    """Builds for narrow and for wide tables."""
    pointers = dict.fromkeys(("table", "y", "d", "total"), "*fp32")
    pointers |= dict.fromkeys(("indices", "ordered", "order"), "*i64")
    distances = ("table_task", "table_row", "indices_task", "R", "D", "V", "padding")
    types = pointers | dict.fromkeys(distances, "i32")
    kernels = {"rows": rows_kernel, "searched": searched_kernel, "sorted": sorted_kernel}
    builds = []
    for width in (16, 768):
        for name, kernel in kernels.items():
            sizes = {"SEARCHED": SEARCHED, **_sizes(width)}
            constants = {n: sizes[n] for n in kernel.arg_names if n not in types}
            signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
            builds.append(Shipped(f"embedding {name}, {width} columns", kernel, signature, constants, WARPS, 1))
    return builds

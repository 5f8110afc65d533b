"""The four maps of a block by Triton kernels: which launches each takes, in which tiles, and what is kept.

Tiles and splits follow from shapes by fixed rules, so that a result is the same on every GPU and at every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmeta.core.task_op import Need
from fastmeta.core.triton_support import Shipped, build_precision, exact_precision, precision, turned_precision
from fastmeta.ops.conv_block import tiles
from fastmeta.ops.conv_block import triton_first as first
from fastmeta.ops.conv_block import triton_norm as norm
from fastmeta.ops.conv_block import triton_products as products
from fastmeta.ops.conv_block.geometry import Geometry
from fastmeta.ops.conv_block.kept import Saved, SavedDot, channel_rows, channels_last, of_windows, sizes, stride


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor, Tensor] | None,
    geometry: Geometry,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Saved]:
    """Result ``[T, N, O, ph, pw]``, new running statistics ``[T, O]`` and what is kept."""
    g = geometry
    kept = Saved(channels_last(x), *_packed(weight, g))
    if g.shallow:
        return _first(
            replace(kept, bias=channel_rows(bias)), (channel_rows(affine[0]), channel_rows(affine[1])), running, g
        )
    z, partial = _convolve(kept, None, bias, g, moments=g.normalised)
    if g.plain:
        return z.movedim(-1, 2), None, kept
    new = None
    scale, shift = (channel_rows(v) for v in affine)
    if partial is not None:
        mean, rstd, new = _moments(partial, tiles.ROWS, running, g)
        kept = replace(kept, z=z, mean=mean, rstd=rstd, scale=scale)
    y, code = of_windows(z, g), of_windows(z, g, torch.uint8)
    peak = of_windows(z, g) if g.normalised and g.pooled else None
    grid, tile = tiles.elementwise(g.windows, z.shape[0], g.out)
    norm.activate[grid](
        z, kept.mean, kept.rstd, scale, shift, y, code, peak, stride(scale), stride(shift),
        *sizes(g), g.slope, **tiles.pool_constants(g), ACTIVATION=g.activation, **tile, **tiles.OPTIONS, num_stages=1,
    )  # fmt: skip
    peak = kept.z if g.normalised and not g.pooled else peak
    return y.movedim(-1, 2), new, replace(kept, code=code, peak=peak)


def backward(saved: Saved, d_y: Tensor, need: Sequence[Need], geometry: Geometry) -> dict[str, Tensor | None]:
    """Cotangents of ``x``, ``weight``, ``bias``, ``scale`` and ``shift`` of which ``need`` says which are wanted."""
    d, sums, g = channels_last(d_y), None, geometry
    if saved.code is not None and (g.normalised or need[2]):
        sums = _window_sums(saved, None, d, None, g)
    d_z = d
    anew = g.shallow and not need[0]
    if saved.code is not None and (need[0] or need[1]) and not anew:
        saved = _formed(saved, g)
        d_z, _ = _positions(saved, None, d, None, sums, g)
    results: dict[str, Tensor | None] = {}
    if need[0]:
        results["x"] = _spread(d_z, saved.turned, None, None, g)
    if need[1] and anew:
        results["weight"] = _correlate_anew(saved, SavedDot(), d, None, sums, g, shared=need[1] is Need.SHARED)
    elif need[1]:
        results["weight"] = _correlate((saved.x, d_z), None, g, shared=need[1] is Need.SHARED)
    results.update(_affine(need, g, d, sums, 0, 1))
    return results


def tangent(
    saved: Saved,
    x_dot: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    affine_dot: tuple[Tensor | None, Tensor | None],
    geometry: Geometry,
) -> tuple[Tensor, SavedDot]:
    """``y_dot`` and what is kept; at least one tangent is given."""
    g, tasks = geometry, saved.x.shape[0]
    packed = (None, None) if weight_dot is None else _packed(weight_dot, g)
    dot = SavedDot(None if x_dot is None else channels_last(x_dot), *packed)
    if g.shallow and x_dot is None:
        return _first_tangent(saved, dot, (channel_rows(affine_dot[0]), channel_rows(affine_dot[1])), g)
    saved = _formed(saved, g)
    moves = None
    if x_dot is None and weight_dot is None:
        z_dot = saved.x.new_zeros((tasks, g.images, *g.conv_size, g.out))
        if bias_dot is not None and not g.normalised:
            z_dot += bias_dot[:, None, None, None, :]
        moves = saved.x.new_zeros((tasks, 2, g.out)) if g.normalised else None
    else:  # a bias moves the mean, and nothing else, of what is normalised
        z_dot, partial = _convolve(saved, dot, None if g.normalised else bias_dot, g, moments=g.normalised)
        moves = None if partial is None else _folded(partial)
    if g.plain:
        return z_dot.movedim(-1, 2), dot
    scale_dot, shift_dot = (channel_rows(v) for v in affine_dot)
    y_dot = of_windows(z_dot, g)
    peak_dot = of_windows(z_dot, g) if g.normalised and g.pooled else None
    grid, tile = tiles.elementwise(g.windows, tasks, g.out)
    norm.activate_tangent[grid](
        z_dot, saved.code, saved.peak, saved.mean, saved.rstd, moves, saved.scale, scale_dot, shift_dot, y_dot,
        peak_dot, stride(saved.scale), stride(scale_dot), stride(shift_dot), *sizes(g), g.slope,
        **tiles.pool_constants(g), **tile, **tiles.OPTIONS, num_stages=1,
    )  # fmt: skip
    if g.normalised:
        peak_dot = peak_dot if g.pooled else z_dot
        dot = replace(dot, z_dot=z_dot, peak_dot=peak_dot, moves=moves, scale_dot=scale_dot)
    return y_dot.movedim(-1, 2), dot


def tangent_backward(
    saved: Saved, dot: SavedDot, d_y: Tensor, d_y_dot: Tensor, need: Sequence[Need], geometry: Geometry
) -> dict[str, Tensor | None]:
    """Tangents of what :func:`backward` returns."""
    d, d_dot, sums, g = channels_last(d_y), channels_last(d_y_dot), None, geometry
    if saved.code is not None and (g.normalised or need[2]):
        sums = _window_sums(saved, dot, d, d_dot, g) if g.normalised else _window_sums(saved, None, d_dot, None, g)
    d_z, d_z_dot = d, d_dot
    anew = g.shallow and not need[0] and dot.x_dot is None
    if saved.code is not None and (need[0] or need[1]) and not anew:
        saved, dot = _formed(saved, g), _formed_dot(saved, dot, g)
        read = (need[0] and dot.turned_dot is not None) or (need[1] and dot.x_dot is not None)
        d_z, d_z_dot = _positions(saved, dot, d, d_dot, sums, g, primal=bool(read))
    results: dict[str, Tensor | None] = {}
    if need[0]:
        results["x"] = _spread(d_z_dot, saved.turned, d_z, dot.turned_dot, g)
    if need[1] and anew:
        results["weight"] = _correlate_anew(saved, dot, d, d_dot, sums, g, shared=need[1] is Need.SHARED)
    elif need[1]:
        other = None if dot.x_dot is None else (dot.x_dot, d_z)
        results["weight"] = _correlate((saved.x, d_z_dot), other, g, shared=need[1] is Need.SHARED)
    results.update(_affine(need, g, d_dot, sums, 2, 3) if g.normalised else _affine(need, g, d_dot, sums, 0, 1))
    return results


def _affine(
    need: Sequence[Need], g: Geometry, d: Tensor, sums: Tensor | None, plain: int, turned: int
) -> dict[str, Tensor | None]:
    """Cotangents of bias, scale and shift from the sums over windows."""
    results: dict[str, Tensor | None] = {}
    if need[2] and g.normalised:  # the mean takes the bias away again
        results["bias"] = d.new_zeros((d.shape[0], g.out))
    elif need[2]:
        results["bias"] = d.sum((1, 2, 3)) if sums is None else sums[:, plain]
    if sums is not None and g.normalised:
        results["scale"] = sums[:, turned] if need[3] else None
        results["shift"] = sums[:, plain] if need[4] else None
    for name, wanted in zip(("bias", "scale", "shift"), need[2:], strict=True):
        value = results.get(name)
        if value is not None and wanted is Need.SHARED:
            results[name] = value.sum(0)
    return results


def _packed(weight: Tensor, g: Geometry) -> tuple[Tensor, Tensor]:
    """A weight ``[O, I, kh, kw]`` or ``[T, O, I, kh, kw]`` as products read it: :class:`Saved`'s two."""
    tasks = weight if weight.dim() == 5 else weight.unsqueeze(0)
    if not tasks[:1].is_contiguous():
        tasks = tasks.contiguous()
    parts = tiles.weight_parts(g, precision())
    shape = tasks.shape[0], parts, g.convolution.taps
    straight, turned = tasks.new_empty((*shape, g.out, g.channels)), tasks.new_empty((*shape, g.channels, g.out))
    grid, tile = tiles.reordered(g, tasks.shape[0])
    products.pack[grid](tasks, straight, turned, tasks.stride(0), PARTS=parts, **tile, **tiles.OPTIONS, num_stages=1)
    return straight, turned


def _formed(saved: Saved, g: Geometry) -> Saved:
    """With ``z``, where it was not kept and is read after all."""
    if saved.z is not None or not g.normalised:
        return saved
    return replace(saved, z=_convolve(saved, None, saved.bias, g, moments=False)[0])


def _formed_dot(saved: Saved, dot: SavedDot, g: Geometry) -> SavedDot:
    """With ``z_dot``, likewise."""
    if dot.z_dot is not None or not g.normalised:
        return dot
    if dot.x_dot is None and dot.weight_dot is None:
        return replace(dot, z_dot=saved.x.new_zeros((saved.x.shape[0], g.images, *g.conv_size, g.out)))
    return replace(dot, z_dot=_convolve(saved, dot, None, g, moments=False)[0])


def _convolve(
    saved: Saved, dot: SavedDot | None, bias: Tensor | None, g: Geometry, *, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """``z = x * W + b``, or its tangent, with partial sums of every block of positions for the normalisation."""
    x, tasks = saved.x, saved.x.shape[0]
    constants = tiles.product_constants(g, tasks, saved.weight.shape[1], transposed=False)
    pairs: list[Tensor | None] = [x, saved.weight]
    if dot is not None:
        terms = [(dot.x_dot, saved.weight), (x, dot.weight_dot)]
        pairs = [v for pair in terms if pair[0] is not None and pair[1] is not None for v in pair]
    pairs += [None] * (4 - len(pairs))
    blocks = tiles.cdiv(g.positions, tiles.ROWS)
    z = x.new_empty((tasks, g.images, *g.conv_size, g.out))
    partial = x.new_empty((tasks, blocks, 2, g.out)) if moments else None
    of = (saved.z, saved.mean, saved.rstd) if dot is not None and moments else (None, None, None)
    bias = channel_rows(bias)
    grid = blocks, tasks, tiles.cdiv(g.out, constants["BN"])
    products.product[grid](
        *pairs, bias, z, partial, *of, stride(pairs[1]), stride(pairs[3]), stride(bias),
        g.images, *g.size, *g.conv_size, **constants, PRECISION=build_precision(),
        **tiles.product_options(constants, math.prod(grid)),
    )  # fmt: skip
    return z, partial


def _spread(d: Tensor, weight: Tensor, d2: Tensor | None, weight2: Tensor | None, g: Geometry) -> Tensor:
    """``d_x = d *^T W`` and, with a second weight, ``+ d2 *^T W2``: ``[T, N, I, H, W]``."""
    tasks = d.shape[0]
    constants = tiles.product_constants(g, tasks, weight.shape[1], transposed=True)
    d_x = d.new_empty((tasks, g.images, *g.size, g.channels))
    if weight2 is None:
        d2 = None
    grid = (tiles.cdiv(g.images * g.size[0] * g.size[1], tiles.ROWS), tasks, tiles.cdiv(g.channels, constants["BN"]))
    products.product[grid](
        d, weight, d2, weight2, None, d_x, None, None, None, None, stride(weight), stride(weight2), 0,
        g.images, *g.conv_size, *g.size, **constants, PRECISION=build_precision(),
        **tiles.product_options(constants, math.prod(grid)),
    )  # fmt: skip
    return d_x.movedim(-1, 2)


def _correlate(
    pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None, g: Geometry, *, shared: bool
) -> Tensor:
    """``corr(x, d) (+ corr(x2, d2))``: ``[T, O, I, kh, kw]``, or summed over tasks."""
    x, tasks, constants = pair[0], pair[0].shape[0], tiles.correlation_constants(g)
    programs, pieces, span = tiles.split(g, tasks)
    partial = x.new_empty((tasks, pieces, g.patch, g.out))
    products.correlation[(programs, tasks, pieces)](
        *pair, *(other or (None, None)), partial, g.images, *g.size, *g.conv_size, span,
        **constants, PRECISION=turned_precision(), **tiles.correlation_options(g),
    )  # fmt: skip
    return _collected(partial, g, shared=shared)


def _collected(partial: Tensor, g: Geometry, *, shared: bool) -> Tensor:
    """The sum of a weight cotangent's pieces, ``[T, pieces, taps * I, O]``, in PyTorch's order."""
    tasks, pieces = partial.shape[:2]
    kernel = (g.out, g.channels, *g.convolution.kernel)
    out = partial.new_empty(kernel if shared else (tasks, *kernel))
    grid, tile = tiles.reordered(g, 1 if shared else tasks)
    products.collect[grid](partial, out, tasks * pieces if shared else pieces, **tile, **tiles.OPTIONS, num_stages=1)
    return out


def _first(
    kept: Saved,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor, Tensor] | None,
    g: Geometry,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Saved]:
    """:func:`forward` where ``z`` is computed anew."""
    mean, rstd, new = _moments(_first_moments(kept, None, g), tiles.FIRST_ROWS, running, g)
    kept = replace(kept, mean=mean, rstd=rstd, scale=affine[0])
    y, peak, code = of_windows(kept.x, g), of_windows(kept.x, g), of_windows(kept.x, g, torch.uint8)
    middle = kept.x.mean((1, 2, 3))
    kept = replace(kept, code=code, peak=peak, middle=middle, spread=_spread_of_patches(kept.x, middle, g))
    _first_windows(kept, SavedDot(), affine[1], None, y, None, g)
    return y.movedim(-1, 2), new, kept


def _first_tangent(
    saved: Saved, dot: SavedDot, affine_dot: tuple[Tensor | None, Tensor | None], g: Geometry
) -> tuple[Tensor, SavedDot]:
    """:func:`tangent` where ``z_dot`` is computed anew."""
    turned_dot = dot.turned_dot if dot.turned_dot is not None else torch.zeros_like(saved.turned)
    moves = _folded(_first_moments(saved, turned_dot, g))
    y_dot, peak_dot = of_windows(saved.x, g), of_windows(saved.x, g)
    dot = SavedDot(None, dot.weight_dot, turned_dot, None, peak_dot, moves, affine_dot[0])
    _first_windows(saved, dot, None, affine_dot[1], y_dot, peak_dot, g)
    return y_dot.movedim(-1, 2), dot


def _first_moments(saved: Saved, turned_dot: Tensor | None, g: Geometry) -> Tensor:
    """Partial moments of ``z``, or sums for its tangent, ``[T, blocks, 2, O]``."""
    constants, tasks = tiles.first_constants(g, tiles.FIRST_ROWS, pooled=False), saved.x.shape[0]
    blocks = tiles.cdiv(g.positions, tiles.FIRST_ROWS)
    partial = saved.x.new_empty((tasks, blocks, 2, g.out))
    statistics = (None, None) if turned_dot is None else (saved.mean, saved.rstd)
    first.moments[(blocks, tasks, tiles.cdiv(g.out, constants["BC"]))](
        saved.x, saved.turned, turned_dot, saved.bias, *statistics, partial, stride(saved.turned), stride(turned_dot),
        stride(saved.bias), *g.size, g.images, *g.conv_size, **constants, PRECISION=build_precision(),
        **tiles.OPTIONS, num_stages=1,
    )  # fmt: skip
    return partial


def _first_windows(
    saved: Saved,
    dot: SavedDot,
    shift: Tensor | None,
    shift_dot: Tensor | None,
    y: Tensor,
    peak_dot: Tensor | None,
    g: Geometry,
) -> None:
    """Write ``y``, codes and peaks, or with a tangent ``y_dot`` and the peaks' tangents."""
    constants, tasks = tiles.windows_constants(g), saved.x.shape[0]
    first.windows[(tiles.cdiv(g.windows, constants["BM"]), tasks, tiles.cdiv(g.out, constants["BC"]))](
        saved.x, saved.turned, dot.turned_dot, saved.bias, saved.mean, saved.rstd, dot.moves, saved.scale, shift,
        dot.scale_dot, shift_dot, saved.code, saved.peak, y, peak_dot, stride(saved.turned), stride(dot.turned_dot),
        stride(saved.bias), stride(saved.scale), stride(shift), stride(dot.scale_dot), stride(shift_dot),
        *g.size, *sizes(g), g.slope, **constants, ACTIVATION=g.activation, PRECISION=build_precision(),
        **tiles.windows_options(g),
    )  # fmt: skip


def _spread_of_patches(x: Tensor, middle: Tensor, g: Geometry) -> Tensor:
    """:attr:`Saved.spread`."""
    constants, tasks = tiles.covariance_constants(g), x.shape[0]
    pieces, span = tiles.pieces(g.positions, tasks, constants["BM"])
    partial = x.new_empty((tasks, pieces, constants["BK"] + 1, constants["BK"]))
    first.covariance[(pieces, tasks)](
        x, middle, partial, *g.size, g.images, *g.conv_size, span, **constants, PRECISION=exact_precision(),
        **tiles.FEW_WARPS,
    )  # fmt: skip
    return _folded(partial)


def _correlate_anew(
    saved: Saved, dot: SavedDot, d: Tensor, d_dot: Tensor | None, sums: Tensor | None, g: Geometry, *, shared: bool
) -> Tensor:
    """``corr(x, d_z)``, or with a tangent ``corr(x, d_z_dot)``, where neither image exists."""
    constants, tasks = tiles.maxima_constants(g), saved.x.shape[0]
    pieces, span = tiles.pieces(g.windows, tasks * tiles.cdiv(g.out, constants["BC"]), constants["BM"])
    partial = saved.x.new_empty((tasks, pieces, g.patch, g.out))
    turned_dot = None if d_dot is None else dot.turned_dot
    first.correlation[(pieces, tasks, tiles.cdiv(g.out, constants["BC"]))](
        saved.x, saved.turned, turned_dot, saved.middle, saved.spread, d, d_dot, saved.code, saved.rstd, saved.scale,
        dot.scale_dot, dot.moves, sums, partial, stride(saved.turned), stride(turned_dot), stride(saved.scale),
        stride(dot.scale_dot), *g.size, *sizes(g), g.slope, span, **constants, Q=2 if d_dot is None else 4,
        PRECISION=turned_precision(), EXACT=exact_precision(), **tiles.FEW_WARPS,
    )  # fmt: skip
    return _collected(partial, g, shared=shared)


def _moments(
    partial: Tensor, span: int, running: tuple[Tensor, Tensor] | None, g: Geometry
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Mean, reciprocal deviation and new running statistics, ``[T, O]``, from blocks of ``span`` positions."""
    tasks, blocks = partial.shape[:2]
    columns, tile = tiles.cdiv(g.out, 32), {"C": g.out, "BB": tiles.BLOCKS, "BC": 32}
    while blocks > 4 * tiles.BLOCKS:
        groups = tiles.cdiv(blocks, tiles.BLOCKS)
        merged = partial.new_empty((tasks, groups, 2, g.out))
        norm.merge_moments[(groups, tasks, columns)](
            partial, merged, g.positions, span, blocks, **tile, **tiles.OPTIONS, num_stages=1
        )
        partial, blocks, span = merged, groups, span * tiles.BLOCKS
    mean, rstd = (partial.new_empty((tasks, g.out)) for _ in range(2))
    old: tuple[Tensor | None, ...] = (None, None)
    new: tuple[Tensor, Tensor] | None = None
    if running is not None:
        old = tuple(channel_rows(v) for v in running)
        new = torch.empty_like(mean), torch.empty_like(mean)
    norm.finish_moments[(tasks, columns)](
        partial, mean, rstd, *old, *(new or (None, None)), stride(old[0]), g.positions, span, blocks, g.eps,
        g.momentum, **tile, **tiles.OPTIONS, num_stages=1,
    )  # fmt: skip
    return mean, rstd, new


def _folded(partial: Tensor) -> Tensor:
    """Sums over the blocks, ``[T, blocks, Q, C] -> [T, Q, C]``."""
    tasks, blocks = partial.shape[:2]
    width = partial.shape[2] * partial.shape[3]
    tile = {"BB": tiles.BLOCKS, "BC": 32}
    while blocks > 1:
        groups = tiles.cdiv(blocks, tiles.BLOCKS) if blocks > 4 * tiles.BLOCKS else 1
        group = tiles.BLOCKS if groups > 1 else blocks
        out = partial.new_empty((tasks, groups, *partial.shape[2:]))
        norm.fold[(groups, tasks, tiles.cdiv(width, 32))](
            partial, out, width, blocks, group, **tile, **tiles.OPTIONS, num_stages=1
        )
        partial, blocks = out, groups
    return partial[:, 0]


def _window_sums(saved: Saved, dot: SavedDot | None, d: Tensor, d_dot: Tensor | None, g: Geometry) -> Tensor:
    """Sums of ``triton_norm.window_sums``, ``[T, Q, C]``."""
    q = 4 if dot is not None else 2 if g.normalised else 1
    grid, span, tile = tiles.sums(g.windows, d.shape[0], g.out)
    partial = d.new_empty((d.shape[0], grid[0], q, g.out))
    peak_dot, moves = (None, None) if dot is None else (dot.peak_dot, dot.moves)
    norm.window_sums[grid](
        d, d_dot, saved.code, saved.peak, peak_dot, saved.mean, saved.rstd, moves, partial, g.windows, span, g.slope,
        g.positions, C=g.out, Q=q, **tile, **tiles.OPTIONS, num_stages=1,
    )  # fmt: skip
    return _folded(partial)


def _positions(
    saved: Saved,
    dot: SavedDot | None,
    d: Tensor,
    d_dot: Tensor | None,
    sums: Tensor | None,
    g: Geometry,
    *,
    primal: bool = True,
) -> tuple[Any, Any]:
    """``d_z``, if it is read, and, with a tangent, ``d_z_dot``: ``[T, N, h, w, O]``."""
    tasks = d.shape[0]
    shape = (tasks, g.images, *g.conv_size, g.out)
    d_z = d.new_empty(shape) if primal else None
    d_z_dot = None if d_dot is None else d.new_empty(shape)
    z_dot, moves, scale_dot = (None,) * 3 if dot is None else (dot.z_dot, dot.moves, dot.scale_dot)
    q = 1 if sums is None or not g.normalised else sums.shape[1]
    grid, tile = tiles.elementwise(g.positions, tasks, g.out)
    norm.input_cotangent[grid](
        d, d_dot, saved.code, saved.z, z_dot, saved.mean, saved.rstd, saved.scale, scale_dot, moves, sums, d_z,
        d_z_dot, stride(saved.scale), stride(scale_dot), *sizes(g), g.slope, **tiles.pool_constants(g), Q=q,
        **tile, **tiles.OPTIONS, num_stages=1,
    )  # fmt: skip
    return d_z, d_z_dot


def shipped() -> list[Shipped]:
    """Builds that the usual networks ask for."""
    from fastmeta.ops.conv_block import triton_builds

    return triton_builds.builds()

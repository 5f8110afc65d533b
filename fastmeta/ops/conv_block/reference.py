"""A block ``y = pool(act(c x + b))``, ``x = (z - mu) r``, ``z = a * W + bias`` in plain PyTorch: its four maps.

The rows "convolution", "elementwise" and "batch norm" of docs/maths.md, section 2, one after another. Max pooling and a
piecewise linear activation have no second term: every map replays the choices of the forward pass.

Shapes: images ``[T, N, C, H, W]``; a weight ``[O, I, kh, kw]`` or ``[T, O, I, kh, kw]``; parameters of channels ``[O]``
or ``[T, O]``. Tasks that have a weight each are groups of one convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.core.task_op import Need, plus
from fastmeta.ops.conv_block.geometry import Geometry

aten = torch.ops.aten
OVER = (1, 3, 4)  # samples and positions


@dataclass(frozen=True)
class Saved:
    """Input, weight, ``x``, ``r``, scale, the activation's slope everywhere, and where the maxima lie."""

    a: Tensor
    weight: Tensor
    x: Tensor | None
    r: Tensor | None
    scale: Tensor | None
    slope: Tensor | None
    where: Tensor | None


@dataclass(frozen=True)
class SavedDot:
    """Tangents of input, weight, ``x``, ``log r`` and scale; ``None`` for zero."""

    a_dot: Tensor | None
    weight_dot: Tensor | None
    x_dot: Tensor | None
    turn: Tensor | None
    scale_dot: Tensor | None


def forward(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None],
    running: tuple[Tensor, Tensor] | None,
    g: Geometry,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Saved]:
    """Result ``[T, N, O, ph, pw]``, new running statistics ``[T, O]`` and what is kept."""
    v = _convolve(a, weight, g)
    if bias is not None:
        v = v + _broad(bias)
    x = r = new = None
    if g.normalised:
        mean = v.mean(OVER)
        centred = v - _broad(mean)
        variance = (centred * centred).mean(OVER)
        r = torch.rsqrt(variance + g.eps)
        v = x = centred * _broad(r)
        if running is not None:
            unbiased = variance * (g.positions / max(g.positions - 1, 1))
            new = torch.lerp(running[0], mean, g.momentum), torch.lerp(running[1], unbiased, g.momentum)
        if affine[0] is not None:
            v = v * _broad(affine[0])
        if affine[1] is not None:
            v = v + _broad(affine[1])
    slope = None
    if g.activation != "identity":
        slope = torch.ones_like(v).masked_fill_(v <= 0, g.slope)
        v = torch.relu(v) if g.activation == "relu" else F.leaky_relu(v, g.slope)
    where = None
    if g.pooled:
        v, where = aten.max_pool2d_with_indices(v.flatten(0, 1), *_pool(g))
        v = v.unflatten(0, a.shape[:2])
    return v, new, Saved(a, weight, x, r, affine[0], slope, where)


def backward(saved: Saved, d_y: Tensor, need: Sequence[Need], g: Geometry) -> dict[str, Tensor | None]:
    """Cotangents of ``x``, ``weight``, ``bias``, ``scale`` and ``shift`` of which ``need`` says which are wanted."""
    d_v = _unpooled(saved, d_y, g)
    d_z = _normal(saved, d_v)
    scale = None if saved.x is None else (d_v * saved.x).sum(OVER)
    return _results(
        need,
        lambda: _spread(d_z, saved.weight, g),
        lambda: _correlate(saved.a, d_z, g),
        (d_z.sum(OVER), scale, d_v.sum(OVER)),
    )


def tangent(
    saved: Saved,
    a_dot: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    affine_dot: tuple[Tensor | None, Tensor | None],
    g: Geometry,
) -> tuple[Tensor, SavedDot]:
    """``y_dot`` and what is kept; at least one tangent is given."""
    v_dot = saved.a.new_zeros((saved.a.shape[0], g.images, g.out, *g.conv_size))
    if a_dot is not None:
        v_dot = v_dot + _convolve(a_dot, saved.weight, g)
    if weight_dot is not None:
        v_dot = v_dot + _convolve(saved.a, weight_dot, g)
    if bias_dot is not None:
        v_dot = v_dot + _broad(bias_dot)
    x_dot = turn = None
    if saved.x is not None and saved.r is not None:
        turn = -saved.r * (saved.x * v_dot).mean(OVER)  # of log r
        v_dot = x_dot = _broad(saved.r) * (v_dot - _broad(v_dot.mean(OVER))) + _broad(turn) * saved.x
        if saved.scale is not None:
            v_dot = v_dot * _broad(saved.scale)
        if affine_dot[0] is not None:
            v_dot = v_dot + _broad(affine_dot[0]) * saved.x
        if affine_dot[1] is not None:
            v_dot = v_dot + _broad(affine_dot[1])
    if saved.slope is not None:
        v_dot = v_dot * saved.slope
    if saved.where is not None:
        flat = saved.where.flatten(2)
        v_dot = v_dot.flatten(0, 1).flatten(2).gather(2, flat).view(saved.where.shape).unflatten(0, (-1, g.images))
    return v_dot, SavedDot(a_dot, weight_dot, x_dot, turn, affine_dot[0])


def tangent_backward(
    saved: Saved, dot: SavedDot, d_y: Tensor, d_y_dot: Tensor, need: Sequence[Need], g: Geometry
) -> dict[str, Tensor | None]:
    """Tangents of what :func:`backward` returns."""
    d_v, d_v_dot = _unpooled(saved, d_y, g), _unpooled(saved, d_y_dot, g)
    d_z, d_z_dot = _normal(saved, d_v), _normal_dot(saved, dot, d_v, d_v_dot)
    scale_dot = None
    if saved.x is not None and dot.x_dot is not None:
        scale_dot = (d_v_dot * saved.x + d_v * dot.x_dot).sum(OVER)

    def spread() -> Tensor | None:
        turned = None if dot.weight_dot is None else _spread(d_z, dot.weight_dot, g)
        return plus(_spread(d_z_dot, saved.weight, g), turned)

    def correlate() -> Tensor | None:
        turned = None if dot.a_dot is None else _correlate(dot.a_dot, d_z, g)
        return plus(_correlate(saved.a, d_z_dot, g), turned)

    return _results(need, spread, correlate, (d_z_dot.sum(OVER), scale_dot, d_v_dot.sum(OVER)))


def _normal(saved: Saved, d_v: Tensor) -> Tensor:
    """``d_z = c r (d_v - mean d_v - x mean(x d_v))``."""
    if saved.x is None or saved.r is None:
        return d_v
    scale = saved.r if saved.scale is None else saved.r * saved.scale
    return _broad(scale) * _centred(d_v, saved.x)


def _normal_dot(saved: Saved, dot: SavedDot, d_v: Tensor, d_v_dot: Tensor) -> Tensor:
    """The tangent of :func:`_normal`, product by product."""
    if saved.x is None or saved.r is None or dot.x_dot is None or dot.turn is None:
        return d_v_dot
    scale = saved.r if saved.scale is None else saved.r * saved.scale
    scale_dot = scale * dot.turn
    if dot.scale_dot is not None:
        scale_dot = scale_dot + saved.r * dot.scale_dot
    moved = _centred(d_v_dot, saved.x)
    moved = moved - dot.x_dot * _broad((saved.x * d_v).mean(OVER)) - saved.x * _broad((dot.x_dot * d_v).mean(OVER))
    return _broad(scale_dot) * _centred(d_v, saved.x) + _broad(scale) * moved


def _centred(d: Tensor, x: Tensor) -> Tensor:
    return d - _broad(d.mean(OVER)) - x * _broad((x * d).mean(OVER))


def _unpooled(saved: Saved, d: Tensor, g: Geometry) -> Tensor:
    """A cotangent of the result as one of the activation's input."""
    if saved.where is not None:
        shell = d.new_empty((d.shape[0] * g.images, g.out, *g.conv_size))
        kernel, stride, padding, dilation, ceil = _pool(g)
        d = aten.max_pool2d_with_indices_backward(
            d.flatten(0, 1).contiguous(), shell, kernel, stride, padding, dilation, ceil, saved.where.contiguous()
        ).unflatten(0, (-1, g.images))
    return d if saved.slope is None else d * saved.slope


def _pool(g: Geometry) -> tuple[list[int], list[int], list[int], list[int], bool]:
    kernel, stride, padding = (list(pair) for pair in (g.pool.kernel, g.pool.stride, g.pool.padding))
    return kernel, stride, padding, [1, 1], False


def _results(
    need: Sequence[Need],
    spread: Callable[[], Tensor | None],
    correlate: Callable[[], Tensor | None],
    channels: Sequence[Tensor | None],
) -> dict[str, Tensor | None]:
    values = [spread() if need[0] else None, correlate() if need[1] else None, *channels]
    results = {}
    for name, value, wanted in zip(("x", "weight", "bias", "scale", "shift"), values, need, strict=True):
        if value is not None and wanted is Need.SHARED:
            value = value.sum(0)
        results[name] = value if wanted else None
    return results


def _broad(channels: Tensor) -> Tensor:
    """``[O]`` or ``[T, O]`` against images."""
    return channels[..., None, :, None, None]


def _side_by_side(images: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` as ``[N, T * C, H, W]``, a task a group of channels."""
    return images.transpose(0, 1).flatten(1, 2)


def _apart(images: Tensor, tasks: int) -> Tensor:
    return images.unflatten(1, (tasks, -1)).transpose(0, 1)


def _groups(weight: Tensor, tasks: int) -> Tensor:
    """``[T * O, I, kh, kw]``."""
    return (weight if weight.dim() == 5 else weight.expand(tasks, *weight.shape)).flatten(0, 1)


def _convolve(a: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    tasks, window = a.shape[0], g.convolution
    z = F.conv2d(_side_by_side(a), _groups(weight, tasks), None, window.stride, window.padding, 1, tasks)
    return _apart(z, tasks)


def _spread(d: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    tasks = d.shape[0]
    shell = d.new_empty((g.images, tasks * g.channels, *g.size))
    return _apart(_transposed(d, shell, _groups(weight, tasks), g, [True, False, False])[0], tasks)


def _correlate(a: Tensor, d: Tensor, g: Geometry) -> Tensor:
    tasks = d.shape[0]
    shell = d.new_empty((tasks * g.out, g.channels, *g.convolution.kernel))
    return _transposed(d, _side_by_side(a), shell, g, [False, True, False])[1].unflatten(0, (tasks, -1))


def _transposed(d: Tensor, a: Tensor, weight: Tensor, g: Geometry, mask: list[bool]) -> tuple[Tensor, ...]:
    stride, padding = list(g.convolution.stride), list(g.convolution.padding)
    rows = _side_by_side(d)
    return aten.convolution_backward(rows, a, weight, None, stride, padding, [1, 1], False, [0, 0], d.shape[0], mask)

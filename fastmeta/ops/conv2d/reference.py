"""Convolution ``y = x * W + b`` and its transposes, task-batched: the linear row of docs/maths.md with ``*``.

    backward          d_x     = d_y *^T W                           d_W     = corr(x, d_y)
    tangent           y_dot   = x_dot * W + x * W_dot + b_dot
    tangent_backward  d_x_dot = d_y_dot *^T W + d_y *^T W_dot       d_W_dot = corr(x, d_y_dot) + corr(x_dot, d_y)

Shapes: images ``x [T, N, I, H, W]``, ``y [T, N, O, h, w]``; a weight is ``[O, I / groups, kh, kw]`` where all tasks
share it, or ``[T, O, I / groups, kh, kw]``; a bias ``[O]`` or ``[T, O]``. Results lie channels last in memory, which
the convolutions of a CPU and the normalisations that follow both want. An ``x`` of three axes holds rows of patches
instead (``layout.patches``), where ``Geometry`` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.ops.conv2d.layout import apart, fresh, images, kernel, matrix, patches, side_by_side

# All measured on two cores with oneDNN. Up to here (operations of one task) one grouped convolution over all tasks
# beats a loop over tasks, whose calls cost 60 us each: 64 channels, 5 images of 7x7 (18e6) by 1.5 to 1.9, of 3x3 by 3
# to 4; with 5 images of 14x14 (72e6) the loop wins by 1.3.
GROUPED_FLOPS = 50_000_000
# A grouped convolution of few channels a group misses the fast kernels (1 channel, 28x28: 4 times slower than a loop).
GROUPED_CHANNELS = 8
# The two correlations of d_W_dot as one, by samples laid end to end, win by 1.1 to 1.6 for a few small images (64
# channels, 5 images of 14x14, 7x7, 3x3), and lose to the copy above this many elements (20 of 14x14: by 1.0 to 1.3).
JOINED_ELEMENTS = 1 << 17
# Transposed convolutions of so many channels over all groups are slow (32 tasks of 64 + 64 channels, 7x7: 26 ms against
# 11 for two of half as many).
JOINED_CHANNELS = 2048
# Where a patch is no longer than this share of the channels it becomes, patches take less memory than the result, and
# matrix products beat convolutions of so few input channels: 1 to 64 channels at 28x28 2.3 ms against 4.2 forward, 2.1
# against 3.7 to 12 for d_W, after 1.5 once. At 27 to 32 (colour images, 32 channels) there is nothing to gain.
PATCH_SHARE = 0.5


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation and groups of a convolution, with the shapes of one task."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    flops: int = field(init=False)

    def __post_init__(self) -> None:
        pixels = self.y_shape[0] * math.prod(self.y_shape[2:])
        object.__setattr__(self, "flops", 2 * pixels * math.prod(self.weight_shape))

    @property
    def by_patches(self) -> bool:
        """Whether the input is best kept as rows of patches."""
        return self.groups == 1 and math.prod(self.weight_shape[1:]) <= PATCH_SHARE * self.weight_shape[0]

    @property
    def grouped(self) -> bool:
        """Whether one grouped convolution beats a loop over tasks."""
        few = self.flops <= GROUPED_FLOPS and min(self.weight_shape[:2]) >= GROUPED_CHANNELS
        return few and self.groups == 1

    @property
    def joined(self) -> bool:
        """Whether two correlations are worth laying end to end."""
        return math.prod(self.x_shape) <= JOINED_ELEMENTS

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """``x * W + b`` of images ``[B, I, H, W]``."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def spread(self, d_y: Tensor, weight: Tensor, groups: int) -> Tensor:
        """``d_y *^T W`` of images ``[B, O, h, w]``."""
        # Of the input only size and layout are read.
        x = fresh(d_y, (d_y.shape[0], weight.shape[1] * groups, *self.x_shape[2:]))
        return self._transposed(d_y, x, weight, groups, [True, False, False])[0]

    def correlate(self, x: Tensor, d_y: Tensor, groups: int, tasks: int = 1) -> Tensor:
        """``corr(x, d_y)``, ``[tasks * O, I / groups, kh, kw]``."""
        shape = (self.weight_shape[0] * tasks, *self.weight_shape[1:])
        weight = torch.empty(shape, dtype=x.dtype, device=x.device)  # only its size is read
        return self._transposed(d_y, x, weight, groups, [False, True, False])[1]

    def _transposed(self, d_y: Tensor, x: Tensor, weight: Tensor, groups: int, mask: list[bool]) -> tuple[Tensor, ...]:
        attributes = self.stride, self.padding, self.dilation, False, [0, 0], groups, mask
        return torch.ops.aten.convolution_backward(d_y, x, weight, None, *attributes)


def keep(x: Tensor, geometry: Geometry) -> Tensor:
    """``x`` as the maps want it: images, or rows of patches."""
    if not geometry.by_patches:
        return x
    return patches(x, geometry.weight_shape[2:], geometry.stride, geometry.padding, geometry.dilation)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``y = x * W + b``."""
    weight, bias = _alone(weight, 4), _alone(bias, 1)
    if x.dim() == 3:
        return _by_rows(x, weight, bias, geometry)
    tasks = x.shape[0]
    if weight.dim() == 4:
        common = bias if bias is None or bias.dim() == 1 else None
        y = geometry.convolve(images(x), weight, common, geometry.groups).unflatten(0, (tasks, -1))
        return y if common is bias or bias is None else y.add_(bias[:, None, :, None, None])
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(tasks, -1)
    if geometry.grouped:
        flat = None if bias is None else bias.reshape(-1)
        return apart(geometry.convolve(side_by_side(x), weight.flatten(0, 1), flat, tasks), tasks)
    biases = (None,) * tasks if bias is None else bias.unbind(0)
    operands = list(zip(_each(x), weight.unbind(0), biases, strict=True))
    result = fresh(x, (tasks * x.shape[1], *geometry.y_shape[1:])).unflatten(0, (tasks, -1))
    for y, (a, w, b) in zip(result.unbind(0), operands, strict=True):
        y.copy_(geometry.convolve(a, w, b, geometry.groups))
    return result


def tangent(
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    geometry: Geometry,
) -> Tensor | None:
    """``y_dot = x_dot * W + x * W_dot + b_dot``."""
    if weight_dot is None:
        return None if x_dot is None else forward(x_dot, weight, bias_dot, geometry)
    if x_dot is None:
        return forward(x, weight_dot, bias_dot, geometry)
    tasks, weight = x_dot.shape[0], _alone(weight, 4)
    if x.dim() == 5 and weight.dim() == 5 and geometry.grouped:
        stacked = torch.cat([weight, weight_dot], 2).flatten(0, 1)
        flat = None if bias_dot is None else bias_dot.reshape(-1)
        return apart(geometry.convolve(side_by_side(x_dot, x), stacked, flat, tasks), tasks)
    y_dot = forward(x, weight_dot, bias_dot, geometry)
    if weight.dim() == 4 or geometry.grouped:
        return y_dot.add_(forward(x_dot, weight, None, geometry))
    return _add(y_dot, lambda a, w: geometry.convolve(a, w, None, geometry.groups), _each(x_dot), weight.unbind(0))


def input_cotangent(d_y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``d_x = d_y *^T W``."""
    tasks, weight = d_y.shape[0], _alone(weight, 4)
    if weight.dim() == 4:
        return geometry.spread(images(d_y), weight, geometry.groups).unflatten(0, (tasks, -1))
    if geometry.grouped:
        return apart(geometry.spread(side_by_side(d_y), weight.flatten(0, 1), tasks), tasks)
    result = fresh(d_y, (tasks * d_y.shape[1], *geometry.x_shape[1:])).unflatten(0, (tasks, -1))
    for d_x, d, w in zip(result.unbind(0), _each(d_y), weight.unbind(0), strict=True):
        d_x.copy_(geometry.spread(d, w, geometry.groups))
    return result


def input_cotangent_dot(
    d_y: Tensor | None, d_y_dot: Tensor | None, weight: Tensor, weight_dot: Tensor | None, geometry: Geometry
) -> Tensor | None:
    """``d_x_dot = d_y_dot *^T W + d_y *^T W_dot``."""
    if d_y is None or weight_dot is None:
        return None if d_y_dot is None else input_cotangent(d_y_dot, weight, geometry)
    if d_y_dot is None:
        return input_cotangent(d_y, weight_dot, geometry)
    tasks, weight = d_y.shape[0], _alone(weight, 4)
    if geometry.grouped or tasks == 1:
        if weight.dim() == 4 or tasks * 2 * weight.shape[1] >= JOINED_CHANNELS:
            return input_cotangent(d_y, weight_dot, geometry).add_(input_cotangent(d_y_dot, weight, geometry))
        stacked = torch.cat([weight, weight_dot], 1).flatten(0, 1)
        return apart(geometry.spread(side_by_side(d_y_dot, d_y), stacked, tasks), tasks)
    result = input_cotangent(d_y_dot, weight, geometry)
    return _add(result, lambda d, w: geometry.spread(d, w, geometry.groups), _each(d_y), weight_dot.unbind(0))


def weight_cotangent(d_y: Tensor, x: Tensor, geometry: Geometry, shared: bool) -> Tensor:
    """``d_W = corr(x, d_y)``: ``[T, O, ...]``, or summed over tasks, ``[O, ...]``."""
    tasks = d_y.shape[0]
    if x.dim() == 3:
        d = _rows(d_y)
        # [patch, O] and not [O, patch]: with the short side first the product is four times faster.
        product = torch.mm(x.flatten(0, 1).t(), d.flatten(0, 1)) if shared else torch.bmm(x.mT, d)
        return kernel(product.mT, geometry.weight_shape).contiguous()
    if shared or tasks == 1:
        total = geometry.correlate(images(x), images(d_y), geometry.groups)
        return total if shared else total.unsqueeze(0)
    if geometry.grouped:
        return geometry.correlate(side_by_side(x), side_by_side(d_y), tasks, tasks).unflatten(0, (tasks, -1))
    pairs = zip(_each(x), _each(d_y), strict=True)
    return torch.stack([geometry.correlate(a, d, geometry.groups) for a, d in pairs])


def weight_cotangent_dot(
    d_y: Tensor | None, d_y_dot: Tensor | None, x: Tensor, x_dot: Tensor | None, geometry: Geometry, shared: bool
) -> Tensor | None:
    """``d_W_dot = corr(x, d_y_dot) + corr(x_dot, d_y)``."""
    if d_y is None or x_dot is None:
        return None if d_y_dot is None else weight_cotangent(d_y_dot, x, geometry, shared)
    if d_y_dot is None:
        return weight_cotangent(d_y, x_dot, geometry, shared)
    tasks = d_y.shape[0]
    if x.dim() == 3 or shared or not (geometry.grouped or geometry.joined):
        return weight_cotangent(d_y_dot, x, geometry, shared).add_(weight_cotangent(d_y, x_dot, geometry, shared))
    if geometry.grouped and tasks > 1:
        both = torch.cat([side_by_side(x), side_by_side(x_dot)]), torch.cat([side_by_side(d_y_dot), side_by_side(d_y)])
        return geometry.correlate(*both, tasks, tasks).unflatten(0, (tasks, -1))
    operands = zip(_each(x), _each(x_dot), _each(d_y_dot), _each(d_y), strict=True)
    return torch.stack(
        [geometry.correlate(torch.cat([a, b]), torch.cat([c, d]), geometry.groups) for a, b, c, d in operands]
    )


def bias_cotangent(d_y: Tensor, shared: bool) -> Tensor:
    """``d_b``, the sum of ``d_y`` over images and positions, ``[T, O]``, or over tasks too, ``[O]``."""
    sums = d_y.sum((1, 3, 4))
    return sums.sum(0) if shared else sums


def _alone(value: Any, rank: int) -> Any:
    """The value of the only task, without the task axis; anything else as it is."""
    return value[0] if value is not None and value.dim() > rank and value.shape[0] == 1 else value


def _each(value: Tensor) -> tuple[Tensor, ...]:
    """Each task's images ``[N, C, H, W]``, channels last."""
    return images(value).split(value.shape[1])


def _add(
    total: Tensor, product: Callable[[Tensor, Tensor], Tensor], a: tuple[Tensor, ...], b: tuple[Tensor, ...]
) -> Tensor:
    """Add a product to each task's part of a result of one's own."""
    for part, operands in zip(total.unbind(0), zip(a, b, strict=True), strict=True):
        part.add_(product(*operands))
    return total


def _rows(value: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` as ``[T, N H W, C]``."""
    return value.movedim(2, -1).flatten(1, 3)


def _by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    w = matrix(weight)
    if w.dim() == 2:
        common = bias if bias is None or bias.dim() == 1 else None
        y = F.linear(x, w, common)
        if bias is not None and common is None:
            y.add_(bias.unsqueeze(1))
    elif bias is None:
        y = torch.bmm(x, w.mT)
    else:
        y = torch.baddbmm(bias if bias.dim() == 1 else bias.unsqueeze(1), x, w.mT)
    n, channels, height, width = geometry.y_shape
    return y.view(x.shape[0], n, height, width, channels).movedim(-1, 2)

"""Convolution ``y = x * W + b`` and its transposes, task-batched: the linear row of docs/maths.md with ``*``.

Shapes: images ``x [T, N, I, H, W]``, ``y [T, N, O, H', W']``; a weight is ``[O, I / groups, kh, kw]`` where all tasks
share it, or ``[T, O, I / groups, kh, kw]``; a bias ``[O]`` or ``[T, O]``. Results lie channels-last in memory, which the
convolutions of a CPU and the normalisations that follow both want.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this many positions (samples times pixels) a task, one grouped convolution over all tasks beats a loop over
# tasks: at 64 channels and 5 images of 7x7 by 1.4 in the forward and 1.7 in the transposed maps, of 3x3 by 2 to 3; at
# 5 images of 14x14 they are even, and beyond the loop wins.
GROUPED_POSITIONS = 400
# A grouped convolution of few channels a group misses the fast kernels (1 channel, 28x28: 7 times slower).
GROUPED_CHANNELS = 16
# The two products of a tangent as one, by operands laid side by side, wins by 1.1 to 1.4 while a task's operand is in
# cache, and loses to the cost of the copy above this many elements (75 images of 42x42, 32 channels: 1.6 times slower).
JOINED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation and groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """``x * W + b`` of plain images ``[B, I, H, W]``."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def transposed(self, d_y: Tensor, x: Tensor, weight: Tensor, groups: int, *, of_input: bool) -> Tensor:
        """Cotangent of the input or of the weight; of the one not asked for only the shape is read."""
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            d_y,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0, 0],
            groups,
            [of_input, not of_input, False],
        )
        return d_x if of_input else d_weight


def images(value: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` as ``[T * N, C, H, W]``, channels last in memory; a view where it lies so already."""
    return value.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``y = x * W + b``."""
    tasks = x.shape[0]
    if weight.dim() == 4:
        y = geometry.forward(images(x), weight, bias if bias is None or bias.dim() == 1 else None, geometry.groups)
        y = y.unflatten(0, (tasks, -1))
        return y if bias is None or bias.dim() == 1 else y.add_(_along_channels(bias))
    if bias is not None and bias.dim() == 1:
        bias = bias.expand(tasks, -1)
    if _grouped(x, weight, geometry):
        y = geometry.forward(_side_by_side(x), weight.flatten(0, 1), None if bias is None else bias.flatten(), tasks)
        return _apart(y, tasks)
    flat, n = images(x), x.shape[1]
    pieces = [
        geometry.forward(flat[t * n : t * n + n], weight[t], None if bias is None else bias[t], geometry.groups)
        for t in range(tasks)
    ]
    return torch.cat(pieces).unflatten(0, (tasks, n))


def input_cotangent(d_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """``d_x = d_y *^T W``."""
    tasks = d_y.shape[0]
    if weight.dim() == 4:
        d_x = geometry.transposed(images(d_y), images(x), weight, geometry.groups, of_input=True)
        return d_x.unflatten(0, (tasks, -1))
    if _grouped(x, weight, geometry):
        arguments = _side_by_side(d_y), _side_by_side(x), weight.flatten(0, 1)
        return _apart(geometry.transposed(*arguments, tasks, of_input=True), tasks)
    flat_d, flat_x, n = images(d_y), images(x), x.shape[1]
    pieces = [
        geometry.transposed(
            flat_d[t * n : t * n + n], flat_x[t * n : t * n + n], weight[t], geometry.groups, of_input=True
        )
        for t in range(tasks)
    ]
    return torch.cat(pieces).unflatten(0, (tasks, n))


def weight_cotangent(d_y: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, shared: bool) -> Tensor:
    """``d_W``, correlation of ``d_y`` with ``x``: ``[T, O, ...]``, or summed over tasks, ``[O, ...]``."""
    tasks = d_y.shape[0]
    one = weight if weight.dim() == 4 else weight[0]
    if shared:
        return geometry.transposed(images(d_y), images(x), one, geometry.groups, of_input=False)
    if _grouped(x, weight, geometry):
        stacked = one.unsqueeze(0).expand(tasks, *one.shape).flatten(0, 1)
        d = geometry.transposed(_side_by_side(d_y), _side_by_side(x), stacked, tasks, of_input=False)
        return d.unflatten(0, (tasks, -1))
    flat_d, flat_x, n = images(d_y), images(x), x.shape[1]
    return torch.stack(
        [
            geometry.transposed(
                flat_d[t * n : t * n + n], flat_x[t * n : t * n + n], one, geometry.groups, of_input=False
            )
            for t in range(tasks)
        ]
    )


def bias_cotangent(d_y: Tensor, shared: bool) -> Tensor:
    """``d_b``, the sum of ``d_y`` over images and positions, ``[T, O]``, or over tasks too, ``[O]``."""
    sums = d_y.sum((1, 3, 4))
    return sums.sum(0) if shared else sums


def tangent(
    x: Tensor,
    weight: Tensor,
    x_dot: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
    geometry: Geometry,
) -> Tensor | None:
    """``y_dot = x_dot * W + x * W_dot + b_dot``; the two products as one where that wins."""
    if weight_dot is None:
        return None if x_dot is None else forward(x_dot, weight, bias_dot, geometry)
    if x_dot is None:
        return forward(x, weight_dot, bias_dot, geometry)
    if weight.dim() == 5 and _joined(x, geometry):
        both = torch.cat([_last(x_dot), _last(x)], -1).movedim(-1, 2)
        return forward(both, torch.cat([weight, weight_dot], 2), bias_dot, geometry)
    return forward(x_dot, weight, None, geometry).add_(forward(x, weight_dot, bias_dot, geometry))


def input_cotangent_dot(
    d_y: Tensor | None, d_y_dot: Tensor | None, x: Tensor, weight: Tensor, weight_dot: Tensor | None, geometry: Geometry
) -> Tensor | None:
    """``d_x_dot = d_y_dot *^T W + d_y *^T W_dot``; as one product where that wins."""
    if d_y is None or weight_dot is None:
        return None if d_y_dot is None else input_cotangent(d_y_dot, x, weight, geometry)
    if d_y_dot is None:
        return input_cotangent(d_y, x, weight_dot, geometry)
    if weight.dim() == 5 and _joined(d_y, geometry):
        both = torch.cat([_last(d_y_dot), _last(d_y)], -1).movedim(-1, 2)
        return input_cotangent(both, x, torch.cat([weight, weight_dot], 1), geometry)
    return input_cotangent(d_y_dot, x, weight, geometry).add_(input_cotangent(d_y, x, weight_dot, geometry))


def weight_cotangent_dot(
    d_y: Tensor | None,
    d_y_dot: Tensor | None,
    x: Tensor,
    x_dot: Tensor | None,
    weight: Tensor,
    geometry: Geometry,
    shared: bool,
) -> Tensor | None:
    """``d_W_dot``: correlations of ``d_y_dot`` with ``x`` and of ``d_y`` with ``x_dot``, as one where that wins."""
    if d_y is None or x_dot is None:
        return None if d_y_dot is None else weight_cotangent(d_y_dot, x, weight, geometry, shared)
    if d_y_dot is None:
        return weight_cotangent(d_y, x_dot, weight, geometry, shared)
    if _joined(x, geometry):
        d, operand = torch.cat([d_y_dot, d_y], 1), torch.cat([x, x_dot], 1)
        return weight_cotangent(d, operand, weight, geometry, shared)
    return weight_cotangent(d_y_dot, x, weight, geometry, shared).add_(
        weight_cotangent(d_y, x_dot, weight, geometry, shared)
    )


def _grouped(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether one grouped convolution over all tasks beats a loop over tasks."""
    positions = x.shape[1] * x.shape[3] * x.shape[4]
    channels = min(weight.shape[-3], weight.shape[-4])
    few = positions <= GROUPED_POSITIONS and channels >= GROUPED_CHANNELS
    return few and geometry.groups == 1 and x.shape[0] > 1


def _joined(value: Tensor, geometry: Geometry) -> bool:
    """Whether the two products of a tangent are worth laying side by side."""
    return geometry.groups == 1 and value[0].numel() <= JOINED_ELEMENTS


def _last(value: Tensor) -> Tensor:
    """Channels as the last axis."""
    return value.movedim(2, -1)


def _side_by_side(value: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` as ``[N, T * C, H, W]``: tasks as groups of channels."""
    return value.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _apart(value: Tensor, tasks: int) -> Tensor:
    """``[N, T * C, H, W]`` as ``[T, N, C, H, W]``."""
    return value.unflatten(1, (tasks, -1)).transpose(0, 1)


def _along_channels(bias: Tensor) -> Tensor:
    """``[T, O]`` as ``[T, 1, O, 1, 1]``."""
    return bias[:, None, :, None, None]

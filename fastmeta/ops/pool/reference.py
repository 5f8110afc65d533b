"""Pooling over windows of images: linear once the maxima are found.

    forward           y       = L x          max: y = x[i], where i is where each window's maximum lies
    tangent           y_dot   = L x_dot
    backward          d_x     = L^T d_y
    tangent_backward  d_x_dot = L^T d_y_dot

Shapes: ``x [B, C, H, W]``, ``y [B, C, h, w]``, both with channels last in memory: PyTorch pools that layout ten times
faster on a CPU. ``B`` counts the images of all tasks, ``i`` counts positions within one ``H x W`` plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Window(NamedTuple):
    """Attributes of a pooling call; an empty stride means the kernel's size."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int] = (1, 1)
    ceil_mode: bool = False


def maximum(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """``y`` and ``i``; the first maximum of a window wins a tie, once for all maps."""
    return aten.max_pool2d_with_indices(x, *window)


def maximum_tangent(x_dot: Tensor, i: Tensor) -> Tensor:
    """``y_dot = x_dot[i]``."""
    b, c, h, w = i.shape
    picked = torch.gather(x_dot.permute(0, 2, 3, 1).reshape(b, -1, c), 1, i.permute(0, 2, 3, 1).reshape(b, -1, c))
    return picked.view(b, h, w, c).permute(0, 3, 1, 2)


def maximum_transpose(d: Tensor, i: Tensor, window: Window, size: Sequence[int]) -> Tensor:
    """``d_x``: each cotangent goes to where its maximum came from. ``size`` is that of ``x``."""
    return aten.max_pool2d_with_indices_backward(d, shell(d, size), *window, i)


def average(x: Tensor, window: Window, count_include_pad: bool, divisor: int | None) -> Tensor:
    """Mean of every window."""
    kernel, stride, padding, _, ceil_mode = window
    return aten.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


def average_transpose(
    d: Tensor, window: Window, count_include_pad: bool, divisor: int | None, size: Sequence[int]
) -> Tensor:
    """``d_x``: each cotangent spread evenly over its window."""
    kernel, stride, padding, _, ceil_mode = window
    # torch 2.11 is wrong on a GPU for images with channels last: padding and divisor are not as given. What kernels of
    # ours do not take comes here, float64 above all.
    if d.is_cuda:
        d_x = aten.avg_pool2d_backward(
            d.contiguous(), d.new_empty(tuple(size)), kernel, stride, padding, ceil_mode, count_include_pad, divisor
        )
        return d_x.contiguous(memory_format=torch.channels_last)
    return aten.avg_pool2d_backward(d, shell(d, size), kernel, stride, padding, ceil_mode, count_include_pad, divisor)


def adaptive(x: Tensor, size: Sequence[int]) -> Tensor:
    """Mean of the windows that divide an image into ``size``."""
    return aten.adaptive_avg_pool2d(x, list(size))


def adaptive_transpose(d: Tensor, size: Sequence[int]) -> Tensor:
    """``d_x`` of :func:`adaptive`, where ``size`` is that of ``x``."""
    return aten._adaptive_avg_pool2d_backward(d, shell(d, size))


def shell(d: Tensor, size: Sequence[int]) -> Tensor:
    """Memory nobody reads, for backward functions that ask an input only for its size and layout."""
    return torch.empty(tuple(size), dtype=d.dtype, device=d.device, memory_format=torch.channels_last)

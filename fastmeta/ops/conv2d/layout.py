"""How images lie in memory: tasks stacked on samples, tasks side by side as channel groups, or as rows of patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# From so many channels over all groups, oneDNN's grouped convolutions are faster with channels first: 32 tasks of 64
# channels, 7x7, 4.0 ms against 5.1 forward and 10 against 15 for the weight's gradient; 4 tasks, no difference.
WIDE_CHANNELS = 1024


def images(value: Tensor) -> Tensor:
    """``[T, N, C, H, W]`` as ``[T * N, C, H, W]``, channels last in memory; a view where it lies so already."""
    return value.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised images ``[B, C, H, W]``, channels last in memory."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def side_by_side(*values: Tensor) -> Tensor:
    """Each ``[T, N, C, H, W]`` as ``[N, T * C, H, W]``, a task a group of channels; several joined within a task."""
    n, height, width = values[0].shape[1], *values[0].shape[3:]
    if sum(v.shape[0] * v.shape[2] for v in values) >= WIDE_CHANNELS:
        first = [value.transpose(0, 1) for value in values]
        return (first[0] if len(first) == 1 else torch.cat(first, 2)).reshape(n, -1, height, width)
    last = [value.permute(1, 3, 4, 0, 2) for value in values]
    joined = last[0] if len(last) == 1 else torch.cat(last, -1)
    return joined.reshape(n, height, width, -1).permute(0, 3, 1, 2)


def apart(value: Tensor, tasks: int) -> Tensor:
    """``[N, T * C, H, W]`` as ``[T, N, C, H, W]``, written once, tasks stacked on samples."""
    n, wide, height, width = value.shape
    result = fresh(value, (tasks * n, wide // tasks, height, width)).unflatten(0, (tasks, n))
    return result.copy_(value.unflatten(1, (tasks, -1)).transpose(0, 1))


def patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Rows of patches: ``[T, N, I, H, W] -> [T, N h w, kh kw I]``, so that a convolution is a matrix product."""
    tasks, n, channels, height, width = x.shape
    last = F.pad(images(x).permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    image, row, column, channel = last.stride()
    windows = last.as_strided(
        (tasks * n, *size, *kernel, channels),
        (image, row * stride[0], column * stride[1], row * dilation[0], column * dilation[1], channel),
    )
    return windows.reshape(tasks, n * size[0] * size[1], -1)


def matrix(weight: Tensor) -> Tensor:
    """``[..., O, I, kh, kw]`` as ``[..., O, kh kw I]``, in the order of :func:`patches`."""
    return weight.movedim(-3, -1).flatten(-3)


def kernel(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`matrix` for one task's weight of ``shape``."""
    _, channels, height, width = shape
    return matrix.unflatten(-1, (height, width, channels)).movedim(-1, -3)

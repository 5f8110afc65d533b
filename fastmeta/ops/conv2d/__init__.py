"""Two-dimensional convolution with a weight that tasks share or adapt."""

from fastmeta.ops.conv2d.op import Conv2d

__all__ = ["Conv2d"]

"""A convolution with the batch norm, activation and max pooling that follow it, as one operation."""

from fastmeta.ops.conv_block.op import ConvBlock

__all__ = ["ConvBlock"]

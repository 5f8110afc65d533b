"""A sum of two tensors and the activation that follows, as one operation."""

from fastmeta.ops.sum_block.op import SumBlock

__all__ = ["SumBlock"]

"""An affine map of every task and the activation or the loss that follows, fused on a GPU."""

from fastmeta.ops.linear_block.gram import GramBlock
from fastmeta.ops.linear_block.head import HeadBlock
from fastmeta.ops.linear_block.op import LinearBlock

__all__ = ["GramBlock", "HeadBlock", "LinearBlock"]

"""Layer norm over the trailing axes of every sample."""

from fastmeta.ops.layer_norm.op import LayerNorm

__all__ = ["LayerNorm"]

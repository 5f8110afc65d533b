"""Scaled dot-product attention of several heads."""

from fastmeta.ops.attention.op import Attention

__all__ = ["Attention"]

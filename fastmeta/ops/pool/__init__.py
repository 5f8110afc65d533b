"""Pooling over windows of an image."""

from fastmeta.ops.pool.op import AveragePool, MaxPool

__all__ = ["AveragePool", "MaxPool"]

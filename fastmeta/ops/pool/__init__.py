"""Pooling of images."""

from __future__ import annotations

from fastmeta.ops.pool.op import AdaptiveAveragePool, AveragePool, MaxPool

__all__ = ["AdaptiveAveragePool", "AveragePool", "MaxPool"]

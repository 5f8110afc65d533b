"""Softmax and its logarithm along one axis."""

from fastmeta.ops.softmax.op import LogSoftmax, Softmax

__all__ = ["LogSoftmax", "Softmax"]

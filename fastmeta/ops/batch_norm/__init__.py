"""Batch norm of every task's set, by its own statistics or by running ones."""

from fastmeta.ops.batch_norm.op import BatchNorm

__all__ = ["BatchNorm"]

"""Rows of a table by index, of a table that tasks share or adapt."""

from fastmeta.ops.embedding.op import Embedding

__all__ = ["Embedding"]

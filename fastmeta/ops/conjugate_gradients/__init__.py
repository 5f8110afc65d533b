"""Conjugate gradients of many tasks' linear systems at once."""

from fastmeta.ops.conjugate_gradients.op import advance, backends, start

__all__ = ["advance", "backends", "start"]

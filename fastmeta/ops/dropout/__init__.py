"""Dropout with a mask that is drawn once a task and step, and replayed by every map."""

from fastmeta.ops.dropout.op import Dropout

__all__ = ["Dropout"]

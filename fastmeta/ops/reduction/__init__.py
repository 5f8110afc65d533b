"""Sums and means over axes."""

from __future__ import annotations

from fastmeta.ops.reduction.op import Reduction

__all__ = ["Reduction"]

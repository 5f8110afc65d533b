"""Affine maps."""

from __future__ import annotations

from fastmeta.ops.linear.op import Linear

__all__ = ["Linear"]

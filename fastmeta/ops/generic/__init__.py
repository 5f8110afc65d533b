"""Any ATen overload, by torch.func."""

from __future__ import annotations

from fastmeta.ops.generic.op import GenericOp

__all__ = ["GenericOp"]

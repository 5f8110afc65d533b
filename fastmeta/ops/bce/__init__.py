"""Binary cross-entropy on logits."""

from fastmeta.ops.bce.op import BCEWithLogits

__all__ = ["BCEWithLogits"]

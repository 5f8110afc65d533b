"""Softmax cross-entropy."""

from __future__ import annotations

from fastmeta.ops.cross_entropy.op import CrossEntropy

__all__ = ["CrossEntropy"]

"""Elementwise activations."""

from __future__ import annotations

from fastmeta.ops.activation.op import Activation

__all__ = ["Activation"]

"""Elementwise sums, products and quotients."""

from __future__ import annotations

from fastmeta.ops.arithmetic.op import Product, Quotient, Sum

__all__ = ["Product", "Quotient", "Sum"]

"""Imports every operation, so that the registry knows them all."""

from __future__ import annotations

from fastmeta.ops import activation, linear

__all__ = ["activation", "linear"]

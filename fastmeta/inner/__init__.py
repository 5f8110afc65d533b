"""Inner update rules: a step and its adjoint, and the rates they take."""

from __future__ import annotations

from fastmeta.inner.adaptive import Adagrad, Adam, AdamW, RMSprop
from fastmeta.inner.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]

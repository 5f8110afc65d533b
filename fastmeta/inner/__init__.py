"""Inner update rules: a step and its adjoint, and the rates they take; and when the steps end."""

from __future__ import annotations

from fastmeta.inner.adaptive import Adagrad, Adam, AdamW, RMSprop
from fastmeta.inner.early_stop import EarlyStop
from fastmeta.inner.groups import Groups
from fastmeta.inner.sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "EarlyStop", "Groups", "RMSprop"]

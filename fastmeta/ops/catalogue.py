"""Imports every operation's folder, so that the registry knows them all."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fastmeta import ops

NAMES = tuple(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)

for _name in NAMES:
    import_module(f"fastmeta.ops.{_name}")

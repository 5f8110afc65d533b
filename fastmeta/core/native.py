"""The compiled extension ``fastmeta._C``: loaded on first use, with the reason where it is missing."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastmeta._C"), ""
    except ImportError as error:
        reason = build_record().get("reason") or f"fastmeta._C cannot be imported: {error}"
        return None, reason


def extension() -> ModuleType | None:
    """The extension module, ``None`` where it was not built or cannot be loaded."""
    return _load()[0]


def missing_reason() -> str:
    """Why :func:`extension` is ``None``; empty where it is not."""
    return _load()[1]


def require(op: str) -> ModuleType:
    """The extension module; raises ``RuntimeError`` with the reason where it is missing."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"{op}: backend 'native' is not available here: {reason}")
    return module


def build_record() -> dict[str, Any]:
    """What ``setup.py`` noted when it built the package: mode, instruction sets, and what was left out and why."""
    path = Path(__file__).resolve().parent.parent / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}

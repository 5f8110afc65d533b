"""The compiled extensions ``_C`` (CPU) and ``_cuda``: loaded on first use, with the reason where one is missing."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    return _import("_C", build_record())


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str]:
    module, reason = _import("_cuda", build_record().get("cuda", {}))
    if module is not None:
        count, reason = module.devices()
        if count == 0:
            return None, reason
    return module, reason


def _import(name: str, record: dict[str, Any]) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"fastmeta.{name}"), ""
    except ImportError as error:
        return None, record.get("reason") or f"fastmeta.{name} cannot be imported: {error}"


def extension() -> ModuleType | None:
    """The extension module, ``None`` where it was not built or cannot be loaded."""
    return _load()[0]


def missing_reason() -> str:
    """Why :func:`extension` is ``None``; empty where it is not."""
    return _load()[1]


def cuda_extension() -> ModuleType | None:
    """The CUDA kernels, ``None`` where they were not built, cannot be loaded, or find no device."""
    return _load_cuda()[0]


def cuda_missing_reason() -> str:
    """Why :func:`cuda_extension` is ``None``; empty where it is not."""
    return _load_cuda()[1]


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

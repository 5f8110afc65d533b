"""Checkpoints: tensors in safetensors, all else in JSON. Nothing is ever unpickled.

A checkpoint ``name`` is the file ``name.json``, which names its tensor file and carries that file's SHA-256. The tensor
file is written first, under a name of its own; replacing ``name.json`` is the moment the checkpoint changes. A run that
dies at any point leaves the old checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmeta.core import files

VERSION = 1


def save(folder: str | os.PathLike[str], name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write checkpoint ``name`` in one step and remove the tensors of the one it replaces.

    Args:
        folder: where checkpoints lie; made if need be.
        name: name of the checkpoint, such as ``last``.
        tensors: any tensors by name; tied ones are stored once each.
        state: all else, JSON-able, without NaN or infinities.

    Returns:
        the path of the JSON file.

    Raises:
        OSError: the folder cannot be written.
        ValueError: ``state`` is not JSON-able.
    """
    from safetensors.torch import save as to_bytes

    place = Path(folder)
    content = to_bytes({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    tensor_file = f"{name}-{digest[:16]}.safetensors"
    record = {"version": VERSION, "tensors": tensor_file, "sha256": digest, "state": dict(state)}
    files.write_bytes(place / tensor_file, content)
    files.write_json(place / f"{name}.json", record)
    for old in place.glob(f"{name}-*.safetensors"):
        if old.name != tensor_file:
            old.unlink()
    return place / f"{name}.json"


def load(folder: str | os.PathLike[str], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read checkpoint ``name``.

    Returns:
        ``(tensors, state)`` as they were saved.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: a file is damaged, truncated, missing its partner, or of another version; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no {path}; train first, or name another run folder")
    record = _record(path)
    tensor_path = path.with_name(str(record["tensors"]))
    try:
        content = tensor_path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint: {path} must lie beside {tensor_path.name}, which is missing") from error
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise ValueError(
            f"checkpoint: {tensor_path} must have the SHA-256 {record['sha256']}, got {found}; "
            "it is damaged or truncated, copy it again or use another checkpoint"
        )
    try:
        return from_bytes(content), record["state"]
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {tensor_path} must be a safetensors file, got {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of any ``torch.optim`` optimizer as ``(tensors, JSON)``."""
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, {"plain": plain, "groups": whole["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Put back what :func:`pack_optimizer` gave.

    Raises:
        ValueError: the state is of another optimizer or another set of parameters.
    """
    entries: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **state["plain"]}.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": state["groups"]})


def load_module(module: torch.nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy parameters and buffers into ``module``.

    Args:
        module: takes the values.
        tensors: by the names of ``module.state_dict()``.
        origin: where they come from, for the message.

    Raises:
        ValueError: names, shapes or dtypes do not fit.
    """
    own = module.state_dict()
    differences = [f"{n} is missing" for n in own if n not in tensors]
    differences += [f"{n} is unknown" for n in tensors if n not in own]
    for name in sorted(own.keys() & tensors.keys()):
        wanted, got = own[name], tensors[name]
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            differences.append(f"{name} is {got.dtype} {list(got.shape)} and not {wanted.dtype} {list(wanted.shape)}")
    if differences:
        raise ValueError(
            f"checkpoint: {origin} must fit the model, got: {'; '.join(differences[:5])}"
            + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        )
    module.load_state_dict(dict(tensors))


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix.``, without it."""
    return {n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that start with ``prefix.``."""
    return {f"{prefix}.{n}": t for n, t in tensors.items()}


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} must be JSON, got {error}; it is damaged or truncated") from error
    names = {"version", "tensors", "sha256", "state"}
    if not isinstance(record, dict) or not names <= record.keys() or not isinstance(record["state"], dict):
        raise ValueError(f"checkpoint: {path} must hold {sorted(names)}; it is damaged or no checkpoint of fastmeta")
    if record["version"] != VERSION:
        raise ValueError(
            f"checkpoint: {path} must be of version {VERSION}, got {record['version']}; "
            "read it with the fastmeta that wrote it"
        )
    named = record["tensors"]
    if not isinstance(named, str) or Path(named).name != named or named in ("", ".."):
        raise ValueError(f"checkpoint: {path} must name a file beside it, got {named!r}")
    return record

"""An estimator in files: what was learned in safetensors, parameters in JSON where they are plain values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmeta import algorithms
from fastmeta.algorithms.maml import MAML
from fastmeta.learner import checkpoint
from fastmeta.learner.algorithms import weights_of
from fastmeta.learner.plain import NotPlain, from_plain, to_plain

NAME, KIND = "learner", "MetaLearner"


def write(
    folder: str | os.PathLike[str], learner: MAML, parameters: Mapping[str, Any], history: list[dict[str, Any]]
) -> None:
    """Write a fitted estimator; the folder's old one is replaced in one step.

    Raises:
        OSError: the folder cannot be written.
    """
    kept, missing = {}, []
    for name, value in parameters.items():
        if name != "model":
            try:
                kept[name] = to_plain(_named(value))
            except NotPlain:
                missing.append(name)
    state = {"kind": KIND, "parameters": kept, "missing": missing, "history": history}
    checkpoint.save(folder, NAME, weights_of(learner), state)


def read(
    folder: str | os.PathLike[str], given: Mapping[str, Any], known: set[str]
) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Read what :func:`write` wrote.

    Args:
        folder: where it lies.
        given: parameters that take the place of the stored ones.
        known: names of all parameters.

    Returns:
        ``(tensors, parameters, history)``.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is damaged or no estimator, or a parameter that was not stored is not given.
        TypeError: an unknown parameter is given.
    """
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"load: parameters must be of {sorted(known)}, got {unknown}")
    tensors, state = checkpoint.load(folder, NAME)
    origin = Path(folder) / f"{NAME}.json"
    try:
        parameters = {str(n): from_plain(v) for n, v in state["parameters"].items()}
        missing, history = list(state["missing"]), [dict(record) for record in state["history"]]
        fits = state["kind"] == KIND and parameters.keys() <= known and set(missing) <= known
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"load: {origin} must hold an estimator, got {error!r}") from error
    if not fits:
        raise ValueError(f"load: {origin} must hold an estimator of this version of fastmeta")
    absent = [name for name in missing if name not in given]
    if absent:
        raise ValueError(
            f"load: {absent} must be given, because they are no plain values and {origin} does not hold them; "
            f"write load(path, model, {absent[0]}=...)"
        )
    return tensors, {**parameters, **given}, history


def _named(value: Any) -> Any:
    """Classes and functions that the estimator takes by name, as their names; other values as they are."""
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and any(getattr(place, name, None) is value for place in (algorithms, torch.optim, F)):
        return name
    return dict(value) if isinstance(value, Mapping) else value

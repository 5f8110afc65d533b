"""What the planner compares plans by: rates of this machine, measured once and kept in a file, or cautious defaults."""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastmeta.core import environment, files


@dataclass(frozen=True)
class Rates:
    """Rates of a machine with so many threads at work.

    Attributes:
        flops: float32 operations a second of a large matrix product.
        native: the same of the native executor's products of matrices in cache.
        bytes: of memory a second, read and written.
        near: the same of the last-level cache.
        cache: bytes in which the weights of one task stay at hand: a core's second-level cache.
        last: bytes of the last-level cache that one thread may fill.
        call_s: seconds that a call of the task-batched executor takes beside its work.
        measured: whether these are this machine's own.
    """

    flops: float = 2e11
    native: float = 3e11
    bytes: float = 2e10
    near: float = 5e10
    cache: int = 1 << 20
    last: int = 16 << 20
    call_s: float = 1.5e-5
    measured: bool = False


# Of a data-centre GPU, on which a meta-step is replayed from a graph (H100: 51 TFLOP/s of float32 products, 3.0 TB/s of
# a large copy, 1.2 us from a graph's node to the next), cautiously.
GPU = Rates(flops=4e13, bytes=2.5e12, call_s=1.3e-6)


def file() -> Path:
    """Where measured rates are kept: ``rates.json`` in ``FASTMETA_CACHE``, else in the user's folder for caches."""
    folder = os.environ.get("FASTMETA_CACHE")
    if folder:
        return Path(folder) / "rates.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmeta" / "rates.json"


def known() -> Rates:
    """The rates of this machine at torch's number of threads, as :func:`keep` has left them, or the defaults."""
    return _known(file(), _machine())


@functools.cache
def _known(path: Path, machine: str) -> Rates:
    found = _stored(path).get(machine)
    if found is None:
        return Rates()
    names = [field.name for field in fields(Rates) if field.name != "measured"]
    values: dict[str, Any] = {name: found.get(name) if isinstance(found, dict) else None for name in names}
    if not all(isinstance(value, (int, float)) and value > 0 for value in values.values()):
        said = f"{path} holds no rates for this machine that can be used; run: fastmeta doctor --calibrate"
        warnings.warn(said, stacklevel=2)
        return Rates()
    return Rates(**values, measured=True)


def keep(rates: Rates) -> None:
    """Write this machine's rates into the file, beside those of others, and use them from now on.

    Raises:
        OSError: the file cannot be written.
    """
    path, machine = file(), _machine()
    own = {name: value for name, value in asdict(rates).items() if name != "measured"}
    files.write_json(path, _stored(path) | {machine: own})
    _known.cache_clear()


def _machine() -> str:
    return f"{environment.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}); run: fastmeta doctor --calibrate", stacklevel=2)
        return {}
    return stored if isinstance(stored, dict) else {}

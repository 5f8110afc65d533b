"""``metrics.jsonl``: one JSON record a line, appended as a run goes on, cut back when a run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsLog:
    """An append-only log.

    Args:
        path: the file; its folder must be there.
        size: bytes to keep of what is there: 0 starts anew, the ``size`` of a checkpoint drops the records that a run
            wrote after it and will write again.

    Raises:
        ValueError: the file is shorter than ``size``.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        have = path.stat().st_size if path.is_file() else 0
        if have < size:
            raise ValueError(
                f"metrics: {path} must hold the {size} bytes it had at the checkpoint, got {have}; put the file back"
            )
        self._file = path.open("r+b" if have else "wb")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; it is in the file when this returns."""
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a log. An unfinished last line, as a killed run may leave, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a record; the message names it.
    """
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"metrics: line {number} of {path} must be JSON, got {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"metrics: line {number} of {path} must be a record, got {type(record).__name__}")
        records.append(record)
    return records

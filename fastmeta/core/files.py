"""Writing a file so that a reader finds the old content or the new, never a part of it."""

from __future__ import annotations

import errno
import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the content of ``path`` in one step.

    The data go to a temporary file in the same folder, are flushed to the disk, and take the name by ``os.replace``.
    Missing folders are made.

    Raises:
        OSError: the folder cannot be made or written; the message names it.
    """
    target = Path(path)
    folder = make_folder(target.parent)
    temporary = folder / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {target}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the content of ``path`` by ``text`` in UTF-8, in one step; raises as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace the content of ``path`` by ``value`` as indented JSON, in one step; raises as :func:`write_bytes` does.

    NaN and infinities are refused with ``ValueError``: they are not JSON.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder ``path`` with its parents if need be, and check that files can be made in it.

    Raises:
        OSError: it cannot be made or written; the message names it.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, f"cannot write into folder {folder}: permission denied; choose another output folder"
        )
    return folder


def _unwritable(folder: Path, error: OSError) -> OSError:
    message = f"cannot write into folder {folder}: {error.strerror}; choose another output folder"
    return type(error)(error.errno, message)

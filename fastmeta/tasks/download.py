"""Files fetched once into a cache folder: resumed, retried, checked, and put in place atomically."""

from __future__ import annotations

import hashlib
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says

_BLOCK = 1 << 16


def cache_folder() -> Path:
    """``$FASTMETA_CACHE``, else ``$XDG_CACHE_HOME/fastmeta``, else ``~/.cache/fastmeta``."""
    own = os.environ.get("FASTMETA_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastmeta"


def fetch(
    url: str,
    target: Path,
    md5: str,
    *,
    attempts: int = 3,
    timeout: float = 30.0,
    pause: float = 1.0,
    progress: Progress | None = None,
) -> Path:
    """Download ``url`` to ``target`` unless a file with this checksum is there already.

    An interrupted download stays beside the target as ``*.part`` and is continued by the next call. The target appears
    only once its checksum is right.

    Args:
        url: where the file is, http or https.
        target: where it goes; its folder is made.
        md5: expected MD5 of the whole file, in hexadecimal; it guards against damage, not against malice.
        attempts: how often to try.
        timeout: seconds without an answer before an attempt is given up.
        pause: seconds before the second attempt, doubled for each further one.
        progress: called with the bytes so far and, where known, in all.

    Returns:
        ``target``.

    Raises:
        ValueError: the file came whole, but with another checksum.
        RuntimeError: it could not be fetched; the message tells how to place it by hand.
    """
    if target.is_file() and checksum(target) == md5:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failure: Exception | None = None
    found = ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _append(url, part, timeout, progress)
        except (OSError, EOFError) as error:  # URLError, timeouts and broken connections are OSErrors
            failure = error
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:  # what is there is longer than the file
                part.unlink(missing_ok=True)
            continue
        found = checksum(part)
        if found == md5:
            part.replace(target)
            return target
        failure = None
        part.unlink()  # a wrong whole cannot be continued
    if failure is None:
        raise ValueError(f"fetch: md5 of {url} must be {md5}, got {found}; the file there is damaged or another one")
    raise RuntimeError(
        f"fetch: {url} could not be fetched in {attempts} attempts ({failure}); "
        f"try again to continue, or place the file at {target}"
    ) from failure


def checksum(path: Path) -> str:
    """MD5 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _append(url: str, part: Path, timeout: float, progress: Progress | None) -> None:
    """Continue ``part`` from its present length to the end of ``url``."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        if have and answer.status != 206:  # the server starts from the beginning
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if have else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
    if total is not None and have < total:
        raise EOFError(f"the connection closed after {have} of {total} bytes")

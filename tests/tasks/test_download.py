from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fastmeta.tasks import cache_folder, fetch
from tests.tasks.files import FileServer

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    with FileServer({"a.zip": CONTENT}) as server:
        for _ in range(2):
            path = fetch(server.url("a.zip"), tmp_path / "deep" / "a.zip", MD5, progress=lambda *p: told.append(p))
        assert len(server.requests) == 1
    assert path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in path.parent.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_continued(tmp_path: Path, ranges: bool) -> None:
    with FileServer({"a.zip": CONTENT}, cut=1, ranges=ranges) as server:
        fetch(server.url("a.zip"), tmp_path / "a.zip", MD5, pause=0)
        asked = [r for _, r in server.requests]
    assert asked == [None, f"bytes={len(CONTENT) // 2}-"]
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_an_interrupted_download_is_continued_by_the_next_call(tmp_path: Path) -> None:
    with FileServer({"a.zip": CONTENT}, cut=1) as server:
        with pytest.raises(RuntimeError, match=r"fetched in 1 attempts .*closed after .*place the file at"):
            fetch(server.url("a.zip"), tmp_path / "a.zip", MD5, attempts=1)
        assert not (tmp_path / "a.zip").exists()
        fetch(server.url("a.zip"), tmp_path / "a.zip", MD5)
        assert server.requests[1][1] == f"bytes={len(CONTENT) // 2}-"
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"not this")
    (tmp_path / "a.zip.part").write_bytes(CONTENT + b"too long")
    with FileServer({"a.zip": CONTENT}) as server:
        fetch(server.url("a.zip"), tmp_path / "a.zip", MD5, pause=0)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    with FileServer({"a.zip": CONTENT[:-1]}) as server:
        with pytest.raises(ValueError, match=f"md5 of .* must be {MD5}, got "):
            fetch(server.url("a.zip"), tmp_path / "a.zip", MD5, pause=0)
        assert len(server.requests) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with FileServer({}) as server, pytest.raises(RuntimeError, match=r"404.*place the file at"):
        fetch(server.url("a.zip"), tmp_path / "a.zip", MD5, pause=0)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTMETA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastmeta"
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FASTMETA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fastmeta"

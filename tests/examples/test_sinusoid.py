"""Sine waves: adaptation lowers the error, second order is no worse than first, and the pictures are there."""

from __future__ import annotations

from pathlib import Path

from examples import sinusoid


def test_learns_and_draws(tmp_path: Path) -> None:
    errors = sinusoid.main(["--iterations", "400", "--test-waves", "60", "--out", str(tmp_path)])
    for order in ("second", "first"):
        assert errors[order][10] < 0.85 * errors[order][0]
        assert (tmp_path / f"{order}_order.png").read_bytes().startswith(b"\x89PNG")
    assert errors["second"][1] < errors["first"][1]
    assert errors["second"][10] < errors["second"][5] < errors["second"][1] < errors["second"][0]

"""``python -m fastmeta``."""

from __future__ import annotations

from fastmeta.cli.main import main

main()

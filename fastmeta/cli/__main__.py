"""``python -m fastmeta.cli``."""

from __future__ import annotations

from fastmeta.cli.main import main

main()

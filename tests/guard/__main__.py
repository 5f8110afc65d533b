"""``python -m tests.guard``: writes down the counts of this build, Python and torch, beside those of others."""

from __future__ import annotations

from tests.guard.expected import measured_instructions, measured_python, write

if __name__ == "__main__":
    write("instructions", measured_instructions())
    write("python", measured_python())

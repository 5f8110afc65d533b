"""``python -m benchmarks.gpu.prepare WHAT``: compiles what measuring it will ask for, so that no measurement waits.

``WHAT`` is a workload, ``conv`` or ``attention``. Several can run side by side, which compiling one by one cannot.
"""

from __future__ import annotations

import sys

from benchmarks.gpu import attention, conv, steps


def main(what: str) -> None:
    """Do it."""
    if what == "conv":
        conv.compile_all()
    elif what == "attention":
        attention.compile_all()
    else:
        steps.compile_all(what)


if __name__ == "__main__":
    main(sys.argv[1])

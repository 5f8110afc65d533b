"""A process that ``fastmeta profile`` has started: profiled from the import of fastmeta to its end.

``fastmeta profile`` names a folder in the environment; ``import fastmeta`` finds it there and imports this module,
which begins a profile and writes what it has collected into the folder when the process ends, by an exception too.
"""

from __future__ import annotations

import atexit
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fastmeta.core import files

VARIABLE = "FASTMETA_PROFILE"


@dataclass(frozen=True)
class Order:
    """What the started process is to do.

    Attributes:
        folder: where each process writes ``<its number>.json``, and ``<its number>.trace.json``.
        operations: as :class:`fastmeta.profile` has it.
        trace: whether a Chrome trace is wanted.
        trace_steps: likewise.
    """

    folder: str
    operations: bool = True
    trace: bool = False
    trace_steps: int = 5

    def variable(self) -> dict[str, str]:
        """The environment that carries it."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def found(cls) -> Order:
        """The one in the environment.

        Raises:
            ValueError: it is damaged.
        """
        text = os.environ.get(VARIABLE, "")
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            said = f"{VARIABLE} must be what fastmeta profile sets it to, got {text!r}; unset it"
            raise ValueError(f"profile: {said}") from error


def begin(order: Order) -> None:
    """Profile this process from now on."""
    from fastmeta.profiling.session import profile

    own = os.getpid()
    folder = Path(order.folder)
    trace = folder / f"{own}.trace.json" if order.trace else None
    session = profile(operations=order.operations, trace=trace, trace_steps=order.trace_steps)
    session.start(everywhere=True)

    def end() -> None:
        if os.getpid() == own and folder.is_dir():  # no forked child, whose meta-steps are its parent's
            session.stop()
            files.write_json(folder / f"{own}.json", session.data)

    atexit.register(end)

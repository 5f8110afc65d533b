"""``lower``: a program as the flat list of operations that the native executor walks, where it has kernels for them.

Neighbouring instructions become one operation: a linear layer and its activation; a convolution with the normalisation,
activation and pooling that follow. Values that only change their shape are renamed. The program is cut at what has no
kernel: the executor calls back to its own maps; what reads the task's data alone runs before. What cannot be met that
way raises :class:`NotLowered` with the reason, and the reference executor runs the program.
"""

from dataclasses import replace

from fastmeta.engine.callback import Failures
from fastmeta.engine.lower import layers, losses, norms
from fastmeta.engine.lower.callbacks import Cutter
from fastmeta.engine.lower.gram import in_gram_form, with_gram
from fastmeta.engine.lower.kept_rows import alike, with_kept_rows
from fastmeta.engine.lower.lowering import ONCE, Lowered, Lowering, NotLowered
from fastmeta.engine.lower.tables import with_tables_apart
from fastmeta.engine.program import Program

__all__ = ["ONCE", "Lowered", "NotLowered", "alike", "in_gram_form", "lower", "with_gram", "with_tables_apart"]


def lower(program: Program, outer: tuple[str, ...], failures: Failures) -> Lowered:
    """Lower ``program``.

    Args:
        program: the planned program.
        outer: names of the parameters that do not adapt and get a gradient.
        failures: where callbacks leave their exceptions.

    Raises:
        NotLowered: an operation, a shape or a dtype without native kernels.
    """
    handlers = {**layers.HANDLERS, **norms.HANDLERS, **losses.HANDLERS}
    lowering = Lowering(program, outer)
    lowered = lowering.run(handlers, Cutter(failures))
    return replace(lowered, kept=with_kept_rows(lowering, lowered))

"""What a call of a native operation takes and gives, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastmeta.engine.program import Instruction

ABSENT = -1


@dataclass(frozen=True)
class Operands:
    """One task's operands of a native operation, in bytes without padding.

    Attributes:
        operation: its name.
        instruction: what it was lowered from, fused followers left out; ``None`` where it only changes a layout.
        x: values, data and targets it reads.
        w: parameters it reads.
        y: its result.
        x_varies, w_varies: of ``x`` and ``w`` what depends on adapted parameters.
        x_active, w_active: of ``x`` and ``w`` what gets a cotangent.
        kept_rows: whether it goes through those rows alone that are kept; all are counted here.
    """

    operation: str
    instruction: Instruction | None
    x: int
    w: int
    y: int
    x_varies: int
    w_varies: int
    x_active: int
    w_active: int
    kept_rows: bool = False


@dataclass(frozen=True)
class Sizes:
    """Bytes of one task's values, data and parameters, by their numbers."""

    values: list[int]
    data: list[int]
    parameters: list[int]


def operands(
    operations: Sequence[dict[str, Any]],
    instructions: Sequence[Instruction | None],
    sizes: Sizes,
    adapted: int,
    differentiated: int,
) -> tuple[Operands, ...]:
    """Count the operands of ``operations``.

    Args:
        operations: as csrc/executor/bind.cpp reads them, in execution order; operation i makes value i.
        instructions: what each was lowered from.
        sizes: of what they read and make.
        adapted: how many parameters adapt.
        differentiated: how many get a gradient, the adapted ones included.
    """
    varies, active = [False] * len(operations), [False] * len(operations)
    counted = []
    for number, (operation, instruction) in enumerate(zip(operations, instructions, strict=True)):
        values = {index for is_data, index in operation["x"] if not is_data}
        data = {index for is_data, index in operation["x"] if is_data} | ({operation["target"]} - {ABSENT})
        weights = [w for w in operation["w"] if w != ABSENT]
        varies[number] = any(varies[i] for i in values) or any(w < adapted for w in weights)
        active[number] = any(active[i] for i in values) or any(w < differentiated for w in weights)
        counted.append(
            Operands(
                operation["operation"],
                instruction,
                x=sum(sizes.values[i] for i in values) + sum(sizes.data[i] for i in data),
                w=sum(sizes.parameters[w] for w in weights),
                y=sizes.values[number],
                x_varies=sum(sizes.values[i] for i in values if varies[i]),
                w_varies=sum(sizes.parameters[w] for w in weights if w < adapted),
                x_active=sum(sizes.values[i] for i in values if active[i]),
                w_active=sum(sizes.parameters[w] for w in weights if w < differentiated),
            )
        )
    return tuple(counted)

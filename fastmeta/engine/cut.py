"""Whether a native program that calls back for some operations takes less time than the task-batched executor."""

from __future__ import annotations

import math
from collections.abc import Collection

from fastmeta.core.rates import Rates
from fastmeta.engine.cost import products
from fastmeta.engine.program import Instruction, Program
from fastmeta.engine.work import Work

# A map of an operation in times of a call, ``Rates.call_s``: of one with maps of its own, called back for one task or
# called for all; of the generic one, likewise. Measured on small networks, where nothing else counts (AMD Zen 5).
OWN_BACK, OWN = 5, 5
GENERIC_BACK, GENERIC = 24, 60
# Of a native pass of one task alone: times of a call that it takes beside its operations, and passes over its weights
# that handing them over takes, with their gradients back and without (AMD EPYC, AVX2).
ALONE, HANDED_OVER, HANDED_IN = 10, 20, 3
PASSES = 1, 2, 2, 4  # over its operands that a map without products takes


def pays(programs: tuple[Program, Program], cuts: tuple[Collection[int], ...], work: Work, rates: Rates) -> bool:
    """Compare both, by calls, operations of products and bytes of operands.

    Calls back run one at a time, whatever the number of threads; everything else native is products alone, whose
    operands stay in cache.

    Args:
        programs: of support and query.
        cuts: of each, positions of the instructions that are called back for.
        work: the meta-step.
        rates: of the machine.
    """
    return native_seconds(programs, cuts, work, rates) < reference_seconds(programs, work, rates)


def native_seconds(
    programs: tuple[Program, Program], cuts: tuple[Collection[int], ...], work: Work, rates: Rates
) -> float:
    """What the native executor takes: see :func:`pays`."""
    total = 0.0
    for program, cut, (steps, maps) in zip(programs, cuts, _passes(work), strict=True):
        for position, instruction in enumerate(program.instructions):
            total += _flops(instruction, work, steps, maps) / rates.native
            if position in cut:
                back = GENERIC_BACK if instruction.op.name == "generic" else OWN_BACK
                total += work.tasks * _times(instruction, steps, maps) * back * rates.call_s
                total += _moved(instruction, work, steps, maps, rates)
    return total


def reference_seconds(programs: tuple[Program, Program], work: Work, rates: Rates) -> float:
    """What the task-batched executor takes."""
    total = 0.0
    for program, (steps, maps) in zip(programs, _passes(work), strict=True):
        for instruction in program.instructions:
            call = GENERIC if instruction.op.name == "generic" else OWN
            total += _times(instruction, steps, maps) * call * rates.call_s
            total += _flops(instruction, work, steps, maps) / rates.flops
            total += _moved(instruction, work, steps, maps, rates)
    return total


def passes_pay(program: Program, work: Work, rates: Rates, threads: int) -> bool:
    """Whether passes of one task after the other by the native executor take less time than all together.

    Each has one of the threads for its products. What runs once for all steps, together, runs at each of them alone.
    """
    own = work.packing.size
    others = sum(p.numel() for p in work.parameters.values()) - own
    moved = (HANDED_OVER * own + HANDED_IN * others) * work.theta[0].element_size() / rates.bytes
    native, reference = work.tasks * (ALONE * rates.call_s + moved), 0.0
    for instruction in program.instructions:
        flops = _flops(instruction, work, 1, 2)
        native += flops / rates.native * threads
        call = GENERIC if instruction.op.name == "generic" else OWN
        together = 2 * call * rates.call_s + flops / rates.flops + _moved(instruction, work, 1, 2, rates)
        reference += together / max(1, work.steps) if instruction.invariant else together
    return native < reference


def _flops(instruction: Instruction, work: Work, steps: int, maps: int) -> int:
    """Of its products, for all tasks."""
    return work.tasks * steps * instruction.op.flops() * sum(products(instruction)[:maps])


def _times(instruction: Instruction, steps: int, maps: int) -> int:
    """How many maps run."""
    return maps if instruction.invariant else steps * maps


def _moved(instruction: Instruction, work: Work, steps: int, maps: int, rates: Rates) -> float:
    """Seconds that its operands take on their way, for all tasks."""
    return work.tasks * steps * sum(PASSES[:maps]) * _bytes(instruction) / rates.bytes


def _passes(work: Work) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of support and query: how often, and how many of the four maps."""
    return (work.steps, 2 if work.first_order else 4), (1, 2)


def _bytes(instruction: Instruction) -> int:
    """Of one task's operands."""
    call = instruction.op.call
    kinds = [(i.shape, i.dtype) for i in call.inputs] + [(o.shape, o.dtype) for o in call.outputs]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)

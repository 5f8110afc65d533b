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
    native = reference = 0.0
    for program, cut, (steps, maps) in zip(programs, cuts, _passes(work), strict=True):
        for position, instruction in enumerate(program.instructions):
            generic = instruction.op.name == "generic"
            times = steps * maps if not instruction.invariant else maps
            flops = work.tasks * steps * instruction.op.flops() * sum(products(instruction)[:maps])
            moved = work.tasks * steps * sum(PASSES[:maps]) * _bytes(instruction) / rates.bytes
            reference += times * (GENERIC if generic else OWN) * rates.call_s + flops / rates.flops + moved
            native += flops / rates.native
            if position in cut:
                native += work.tasks * times * (GENERIC_BACK if generic else OWN_BACK) * rates.call_s + moved
    return native < reference


def _passes(work: Work) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of support and query: how often, and how many of the four maps."""
    return (work.steps, 2 if work.first_order else 4), (1, 2)


def _bytes(instruction: Instruction) -> int:
    """Of one task's operands."""
    call = instruction.op.call
    kinds = [(i.shape, i.dtype) for i in call.inputs] + [(o.shape, o.dtype) for o in call.outputs]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds)

"""Where a pass is cut so that little is kept: a segment's activations are computed again from the values before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def starts(made: Sequence[int], live: Sequence[int]) -> tuple[int, ...]:
    """Positions of instructions to run again from, the first of which is 0.

    What is held at a time is the values at every start, and one segment's activations and their cotangents. A smaller
    bound on a segment's activations means more starts: of bounds of which each is nine tenths of the one before, the
    one that holds least is taken. Within a bound, segments end where fewest bytes are live.

    Args:
        made: bytes that each instruction makes.
        live: bytes made before each instruction that it or a later one reads.
    """
    best: tuple[int, ...] = (0,)
    least = 2 * sum(made)
    bound = float(sum(made))
    while bound > max(made, default=0):
        bound *= 0.9
        found = _within(made, live, bound)
        sums = list(accumulate(made, initial=0))
        largest = max(sums[b] - sums[a] for a, b in pairwise((*found, len(made))))
        held = sum(live[start] for start in found) + 2 * largest
        if held < least:
            best, least = found, held
    return best


def _within(made: Sequence[int], live: Sequence[int], bound: float) -> tuple[int, ...]:
    """Starts of segments that make ``bound`` bytes at the most, or are one instruction."""
    found, begin = [0], 0
    while True:
        end, total = begin, 0
        while end < len(made) and (total + made[end] <= bound or end == begin):
            total += made[end]
            end += 1
        if end == len(made):
            return tuple(found)
        begin = min(range(end, begin, -1), key=lambda position: live[position])
        found.append(begin)

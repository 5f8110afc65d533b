"""Everyone who takes part, by name: the peers and fastmeta."""

from __future__ import annotations

from benchmarks.ours import OURS, PLANNED
from benchmarks.peers import PEERS
from benchmarks.peers.base import Variant

VARIANTS: dict[str, Variant] = {v.name: v for v in (*PEERS, *OURS)}
EVERY: dict[str, Variant] = VARIANTS | {v.name: v for v in PLANNED}  # with those that take part only where named

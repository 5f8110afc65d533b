"""``python -m benchmarks.compare``: the comparison by hand, without pytest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import text
from benchmarks.harness import compare
from benchmarks.machine import THREADS, machine_line, use_threads
from benchmarks.report import summary, write
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS
from fastmeta.bench.timing import Effort


def main(arguments: Sequence[str] | None = None) -> None:
    default = Effort()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="interleaved rounds")
    parser.add_argument("--budget", type=float, default=default.budget_s, help="seconds of timing a workload")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--results", type=Path, help="folder to write JSON, Markdown and the picture to")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")

    use_threads(options.threads)
    variants = [VARIANTS[name] for name in options.variant or VARIANTS]
    effort = Effort(options.rounds, default.slot_s, options.budget)
    comparisons = []
    for name in options.workload or [name for name, w in WORKLOADS.items() if w.group == "usual"]:
        comparisons.append(compare(WORKLOADS[name], variants, effort, memory=options.memory, say=_to_stderr))
        print(text(comparisons[-1]), flush=True)
    if len(comparisons) > 1:
        print("\n" + summary(comparisons, machine_line()))
    if options.results:
        for path in write(comparisons, machine_line(), options.results):
            print(path)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""``python -m benchmarks.gpu.run --out FOLDER``: measures everything on this machine's GPU and writes it down.

What is measured is kept after every part, so that an interrupted run loses the part at work alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import attention, conv, kernels, report, steps, vectors
from fastmeta.bench import gpu_peaks
from fastmeta.bench.machine import machine_line
from fastmeta.core import files, triton_support

PARTS = ("steps", "vectors", "conv", "attention", "jax", "kernels", "tf32")
JAX = ("sinusoid_k1", "sinusoid_k5", "sinusoid_tanh", "mlp784")  # convolutions of every task's own take it minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON, table and pictures")
    parser.add_argument("--part", action="append", choices=PARTS, help="only these parts; may be repeated")
    parser.add_argument("--workload", action="append", choices=steps.WORKLOADS, help="only these workloads")
    parser.add_argument("--variant", action="append", choices=steps.VARIANTS, help="only these ways to a meta-step")
    parser.add_argument("--seconds", type=float, default=400, help="begin no further part after so long")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found: dict[str, Any] = {"machine": machine_line()}

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:5.1f} s] {line}", flush=True)

    def part(name: str, key: str, work: Callable[[], Any]) -> None:
        late = time.perf_counter() - start > arguments.seconds
        if (arguments.part and name not in arguments.part) or late:
            found.setdefault("left_out", []).append(key)
            return
        try:
            found[key] = work()
        except Exception as error:  # the others are measured all the same, and the table says so
            found.setdefault("failed", {})[key] = steps.reason_of(error)
            say(f"{key} failed: {found['failed'][key]}")
        files.write_json(arguments.out / "gpu.json", found)

    say(found["machine"])
    measured = gpu_peaks.measure()
    found["peaks"] = asdict(measured)
    say(str(measured))
    names = arguments.workload or steps.WORKLOADS
    for name in names:
        kinds = steps.variants_of(name, arguments.variant or ())
        part("steps", f"step {name}", lambda name=name, kinds=kinds: steps.compare(name, kinds, say))
    part("vectors", "vectors", lambda: vectors.rows(measured))
    rates = {"flops": measured.of(triton_support.precision()), "bytes": measured.bytes}
    part("conv", "conv", lambda: conv.rows(rates))
    say("conv: done")
    part("attention", "attention", lambda: attention.rows(measured))
    say("attention: done")
    for name in (n for n in names if n in JAX):
        part("jax", f"jax {name}", lambda name=name: steps.jax_row(name))
        say(f"jax {name}: {found.get(f'jax {name}')}")
    for name in names:
        part("kernels", f"kernels {name}", lambda name=name: kernels.rows(name, say))
    for name in steps.TF32:
        kinds = ["fastmeta", "torch.func, graph", "torch.func, graph, channels last"]
        part("tf32", f"tf32 {name}", lambda name=name, kinds=kinds: steps.compare(name, kinds, say, with_tf32=True))
    report.write(found, arguments.out)
    say(f"written to {arguments.out}")


if __name__ == "__main__":
    main()

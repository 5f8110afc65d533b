"""``python -m benchmarks.gpu.jax_step WORKLOAD``: JAX's meta-step, jitted, vmap over tasks; prints a row as JSON.

Timed by the host's clock over many calls with one wait at the end: JAX has no events.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

from benchmarks.gpu.steps import WORKLOADS
from benchmarks.peers import jax_jit, torch_loop
from tests.oracle import total_error

ROUNDS, SLOT_S = 5, 0.1


def main(name: str) -> None:
    import jax

    jax.config.update("jax_default_matmul_precision", "float32")
    build = WORKLOADS[name][1]
    step = jax_jit.prepare(build(), form="gpu", wait=False)
    error = total_error(step.gradients(step.run()), torch_loop.prepare(build().double()).run())
    start = time.perf_counter()
    jax.block_until_ready(step.run())
    count = max(1, min(2000, round(SLOT_S / (time.perf_counter() - start))))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            arrays = step.run()
        jax.block_until_ready(arrays)
        times.append((time.perf_counter() - start) / count * 1e3)
    row = {"variant": "jax", "ms": statistics.median(times), "low": min(times), "high": max(times), "error": error}
    print(json.dumps(row))


if __name__ == "__main__":
    main(sys.argv[1])

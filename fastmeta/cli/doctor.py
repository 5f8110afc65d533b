"""``fastmeta doctor``: what is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

import fastmeta.ops
from fastmeta.core import environment, rates
from fastmeta.core.dispatch import Backend


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the rates that plans are compared by, and keep them.")
    ] = False,
) -> None:
    """Show versions, backends with the reason of each one that is missing, instruction sets, threads and GPU."""
    if calibrate:
        from fastmeta.engine.calibrate import measure  # what only shows things need not load the engine

        rates.keep(measure())
    report = gather()
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))


def gather() -> dict[str, Any]:
    """The environment, the rates that plans are compared by, and the backends of every op."""
    backends = {op: [vars(backend) for backend in table] for op, table in tables()}
    return {**environment.gather(), "rates": {**asdict(rates.known()), "file": str(rates.file())}, "backends": backends}


def tables() -> Iterator[tuple[str, tuple[Backend, ...]]]:
    """Name and backend table of every op that has more than its reference."""
    for found in pkgutil.iter_modules(fastmeta.ops.__path__):
        if found.ispkg and importlib.util.find_spec(f"fastmeta.ops.{found.name}.op") is not None:
            module = importlib.import_module(f"fastmeta.ops.{found.name}.op")
            if hasattr(module, "backends"):
                try:
                    yield found.name, module.backends()
                except RuntimeError as error:  # the environment asks for what cannot be
                    yield found.name, (Backend("native", False, str(error)),)


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    machine, native, threads = report["machine"], report["native"], report["threads"]
    lines = ["versions"]
    lines += [f"  {name:<10} {version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["machine", f"  {machine['processor']}, {machine['cores']} cores, {machine['system']}"]
    limit = threads["OMP_NUM_THREADS"]
    lines += ["threads", f"  {threads['torch']}" + (f" (OMP_NUM_THREADS={limit})" if limit else "")]
    lines += ["native kernels"]
    if native["available"]:
        lines += [f"  instruction set {native['instruction_set']}"]
    else:
        lines += [f"  missing: {native['reason']}"]
    if native["compiled"]:
        lines += [f"  compiled: {', '.join(native['compiled'])}; this processor: {', '.join(native['supported'])}"]
    lines += ["gpu"]
    lines += [f"  {device['name']} ({device['capability']})" for device in report["gpu"]["devices"]]
    lines += [f"  none: {report['gpu']['reason']}"] if not report["gpu"]["devices"] else []
    cuda = report["cuda"]
    lines += ["CUDA kernels"]
    lines += [f"  compiled: {', '.join(cuda['compiled'])}"] if cuda["compiled"] else []
    lines += [] if cuda["available"] else [f"  missing: {cuda['reason']}"]
    lines += ["rates that plans are compared by", *_rates(report["rates"])]
    lines += ["backends, best first"]
    for op, table in report["backends"].items():
        for backend in table:
            state = "" if backend["available"] else "missing: "
            lines += [f"  {op:<16} {backend['name']:<10} {state}{backend['reason']}"]
    return "\n".join(lines)


def _rates(found: dict[str, Any]) -> list[str]:
    origin = f"measured; {found['file']}" if found["measured"] else "defaults; --calibrate measures this machine's"
    return [
        f"  {found['flops'] / 1e9:.0f} GFLOP/s, native {found['native'] / 1e9:.0f} GFLOP/s",
        f"  memory {found['bytes'] / 1e9:.0f} GB/s, last-level cache {found['near'] / 1e9:.0f} GB/s",
        f"  caches {found['cache'] >> 10} and {found['last'] >> 10} KiB a thread, call {found['call_s'] * 1e6:.1f} us",
        f"  {origin}",
    ]

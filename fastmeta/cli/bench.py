"""``fastmeta bench``: times of operations and of whole meta-steps, each with its error."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastmeta.bench.html import Section
    from fastmeta.bench.regressions import Timing

WORKLOAD = typer.Option("--workload", help="Only this one; may be repeated.", show_default=False)
DEVICE = typer.Option("--device", help="cpu or cuda.")
JSON = typer.Option("--json", help="Write everything as JSON to this file; - for standard output.", show_default=False)
COMPARE = typer.Option(
    "--compare", help="JSON of an earlier run; the status is 2 if something is slower now.", show_default=False
)
HTML = typer.Option("--html", help="Write a report to this file, which opens without network.", show_default=False)
THREADS = typer.Option("--threads", min=1, help="Threads of every library.", show_default=False)
SLOWER = 2  # exit status

app = typer.Typer(help="Time operations, or whole meta-steps beside peers.", no_args_is_help=True)


@app.command()
def ops(
    workload: Annotated[list[str] | None, WORKLOAD] = None,
    device: Annotated[str, DEVICE] = "cpu",
    json_file: Annotated[str | None, JSON] = None,
    compare: Annotated[Path | None, COMPARE] = None,
    html: Annotated[Path | None, HTML] = None,
    threads: Annotated[int | None, THREADS] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny network if none is named, and few rounds.")] = False,
) -> None:
    """Every operation's four maps on every backend that is present: time, GFLOP/s, GB/s, share of the floor, error."""
    import torch

    from fastmeta.bench import ops, reports
    from fastmeta.bench.ceilings import ceilings
    from fastmeta.bench.machine import machine_line
    from fastmeta.bench.networks import NETWORKS, QUICK

    _check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    earlier = _read(compare, "ops")
    known = NETWORKS | {QUICK.name: QUICK}
    names = workload or ([QUICK.name] if quick else list(NETWORKS))
    _check_names("--workload", names, known)
    rows = []
    for name in names:
        rows += ops.measure(known[name], ops.QUICK if quick else ops.EFFORT, device, _to_stderr)
    content = ops.as_json(rows, machine_line(), ceilings(device).about)
    _hand_out(content, reports.of_ops(rows), json_file, html, "Operations", reports.ops_text(content, rows))
    _judge(earlier, ops.timings(content), ops.timings, None)


@app.command()
def steps(
    workload: Annotated[list[str] | None, WORKLOAD] = None,
    peers: Annotated[str, typer.Option(help="Names, with commas between; all or none.")] = "all",
    device: Annotated[str, DEVICE] = "cpu",
    json_file: Annotated[str | None, JSON] = None,
    compare: Annotated[Path | None, COMPARE] = None,
    html: Annotated[Path | None, HTML] = None,
    threads: Annotated[int | None, THREADS] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory too, a process for each number.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small networks if none is named, and few rounds.")] = False,
) -> None:
    """Whole meta-steps beside peers: what `python -m pytest benchmarks` measures, and the same numbers."""
    _check_device(device)
    earlier = _read(compare, "steps")
    command = _benchmarks("benchmarks.command")
    content, sections, text = command.run(workload, peers, device, threads, memory, quick, _to_stderr)
    _hand_out(content, sections, json_file, html, "Meta-steps", text)
    _judge(earlier, command.timings(content), command.timings, command.is_ours)


def _benchmarks(name: str) -> ModuleType:
    """A module of ``benchmarks``, which lies beside the package in a checkout and is not installed with it.

    Raises:
        RuntimeError: it is in neither place; the message says where to get it.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks" / "command.py").is_file():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return importlib.import_module(name)
    raise RuntimeError(
        "bench steps: the folder benchmarks must be there, which comes with a checkout of the source and not with the "
        f"installed package, got neither {Path(__file__).resolve().parents[2]} nor {Path.cwd()}; clone the source and "
        "run it there (bench ops needs no checkout)"
    )


def _hand_out(
    content: dict[str, Any], sections: list[Section], json_file: str | None, html: Path | None, title: str, text: str
) -> None:
    from fastmeta.bench.html import page
    from fastmeta.core import files

    if json_file == "-":
        typer.echo(json.dumps(content, indent=2, allow_nan=False))
    else:
        typer.echo(text)
        if json_file is not None:
            files.write_json(json_file, content)
    if html is not None:
        files.write_text(html, page(f"fastmeta: {title.lower()}", content["machine"], sections))
        _to_stderr(f"report: {html}")


def _read(path: Path | None, kind: str) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"bench: {path} must be JSON of `fastmeta bench {kind} --json`, got {error}") from error
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise ValueError(f"bench: {path} must be of `fastmeta bench {kind} --json`, got kind {found!r}")
    return content


def _judge(earlier: dict[str, Any] | None, now: Mapping[str, Timing], timings: Any, ours: Any) -> None:
    """Print what changed, and leave with status 2 where something of ours is slower."""
    if earlier is None:
        return
    from fastmeta.bench import regressions
    from fastmeta.bench.texts import table

    found = regressions.changes(timings(earlier), now)
    typer.echo(f"\nbefore: {earlier['machine']}\n")
    typer.echo(table(regressions.HEADER, [regressions.cells(change) for change in found]))
    slower = [c.name for c in found if c.verdict == "slower" and (ours is None or ours(c.name))]
    if slower:
        typer.echo(f"\nslower: {', '.join(slower)}", err=True)
        raise typer.Exit(SLOWER)


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: --device must be cpu or cuda, got {device!r}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("bench: --device cuda must have a GPU, but none is visible; `fastmeta doctor` says why")


def _check_names(option: str, names: list[str], known: Mapping[str, Any]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"bench: {option} must be one of {', '.join(known)}, got {', '.join(unknown)}")


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)

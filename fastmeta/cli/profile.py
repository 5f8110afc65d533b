"""``fastmeta profile``: run any command and show where its meta-steps' time went, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fastmeta.profiling.report import Report


def profile(
    command: Annotated[
        list[str], typer.Argument(help="The command, after --: fastmeta train ..., python train.py ...")
    ],
    json: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the roofline: a .png or .svg file.", show_default=False)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Write a Chrome trace of some meta-steps by torch.profiler.", show_default=False),
    ] = None,
    trace_steps: Annotated[int, typer.Option("--trace-steps", min=1, help="Meta-steps in the trace.")] = 5,
    whole: Annotated[
        bool, typer.Option("--whole", help="Time meta-steps in one piece: on a GPU as they are replayed from a graph.")
    ] = False,
) -> None:
    """Run a command and show where its meta-steps' time goes, and what to do about it.

    As in: fastmeta profile -- python train.py. Every process of it that imports fastmeta is profiled. The tables go to
    stderr after the command has ended, and its exit status is passed on. docs/profiling.md says what is counted how.
    """
    from rich.console import Console

    from fastmeta.profiling.launch import launch
    from fastmeta.profiling.picture import check_ending
    from fastmeta.profiling.report import report_of
    from fastmeta.profiling.tables import show

    if picture is not None:
        check_ending(picture)
    outcome = launch(command, operations=not whole, trace=trace, trace_steps=trace_steps)
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=140)
    busy = [data for data in outcome.processes if data["count"]]
    if not busy:
        console.print(f"fastmeta profile: {_nothing(bool(outcome.processes), outcome.status)}", markup=False)
    reports = [report_of(data) for data in busy]
    for report in reports:
        if len(reports) > 1:
            console.print(f"process {report.data['process']}", markup=False)
        show(report, console)
    if reports:
        _write(reports[0], json, picture, trace, console)
    if outcome.status:
        raise typer.Exit(outcome.status)


def _nothing(imported: bool, status: int) -> str:
    if imported:
        return "no meta-step ran in the command"
    if status > 128:
        return f"signal {status - 128} ended the command before it could write its profile"
    return "no process of the command imported fastmeta, or it left no profile; is fastmeta installed for its Python?"


def _write(report: Report, json: Path | None, picture: Path | None, trace: Path | None, console: Console) -> None:
    from fastmeta.core import files
    from fastmeta.profiling.picture import roofline

    if json is not None:
        files.write_json(json, report.to_json())
    if picture is not None:
        roofline(report, picture)
    if trace is not None and not trace.is_file():
        console.print("no trace: it begins after the first meta-step, and there was one alone", markup=False)
    written = [str(path) for path in (json, picture, trace) if path is not None and path.is_file()]
    if written:
        console.print(f"written: {', '.join(written)}", markup=False, soft_wrap=True)

"""The command ``fastmeta``: finds the subcommand by name and loads its module alone."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Command:
    """A subcommand: its function or the group of its own commands, and the line that ``fastmeta --help`` shows."""

    module: str
    function: str
    help: str

    def load(self) -> Callable[..., Any] | typer.Typer:
        """Import it; a function's annotated arguments are the command's."""
        return getattr(importlib.import_module(self.module), self.function)


COMMANDS = {
    "train": Command("fastmeta.cli.train", "train", "Meta-train a learner on sinusoid, digits or omniglot."),
    "eval": Command("fastmeta.cli.evaluate", "evaluate", "Evaluate a trained learner on new tasks."),
    "demo": Command("fastmeta.cli.demo", "demo", "See it work: exact gradients, fast steps, a trained learner."),
    "bench": Command("fastmeta.cli.bench", "app", "Time operations, or whole meta-steps beside peers."),
    "profile": Command("fastmeta.cli.profile", "profile", "Run a command and show where its meta-steps' time goes."),
    "doctor": Command("fastmeta.cli.doctor", "doctor", "Show versions, backends, instruction sets, threads and GPU."),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave by ``SystemExit``.

    An error of input, file or machine ends in one line on stderr and status 1; with ``FASTMETA_DEBUG=1`` in the
    environment it keeps its traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    app = build_app(next((word for word in words if not word.startswith("-")), None))
    try:
        app(args=words, prog_name="fastmeta")
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        if os.environ.get("FASTMETA_DEBUG") == "1":
            raise
        typer.echo(f"fastmeta: error: {error}", err=True)
        raise SystemExit(1) from error


def build_app(chosen: str | None) -> typer.Typer:
    """The parser, with the chosen command loaded and of the others no more than their names and help."""
    app = typer.Typer(
        help="Exact, task-batched second-order meta-learning for PyTorch.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(no_args_is_help=True)(_root)
    for name, command in COMMANDS.items():
        if name == chosen:
            loaded = command.load()
            if isinstance(loaded, typer.Typer):
                app.add_typer(loaded, name=name, help=command.help)
            else:
                app.command(name)(loaded)
        else:
            app.command(name, help=command.help)(_listed)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        import fastmeta

        typer.echo(f"fastmeta {fastmeta.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Holds the options of ``fastmeta`` itself."""


def _listed() -> None:
    """Stands in the help for a command that was not called."""


if __name__ == "__main__":
    main()

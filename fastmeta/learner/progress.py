"""What a run tells while it goes on: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console


class Reporter(Protocol):
    """Is told of a run's progress."""

    def start(self, step: int, iterations: int) -> None:
        """Training starts, or goes on, at ``step`` of ``iterations``."""

    def advance(self, step: int, figures: Mapping[str, float]) -> None:
        """A meta-step is done; ``figures`` are the latest means: loss, accuracy, tasks_per_s, eta (seconds)."""

    def record(self, record: Mapping[str, Any]) -> None:
        """A record went into the log."""

    def say(self, message: str) -> None:
        """A message for the user."""

    def stop(self) -> None:
        """Training is over."""


class Silent:
    """Tells nothing."""

    def start(self, step: int, iterations: int) -> None:
        """Nothing."""

    def advance(self, step: int, figures: Mapping[str, float]) -> None:
        """Nothing."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class Lines(Silent):
    """One plain line a record, for log files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._iterations = 0

    def start(self, step: int, iterations: int) -> None:
        """Remember the end, to show beside each step."""
        self._iterations = iterations

    def record(self, record: Mapping[str, Any]) -> None:
        """Print the record."""
        text = describe(record)
        if "eta" in record:
            text += f"  ETA {clock(record['eta'])}"
        self.say(f"{record['step']:>7}/{self._iterations}  {text}")

    def say(self, message: str) -> None:
        """Print the message."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


class Live(Silent):
    """A progress bar with the latest figures, and a line for every validation above it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("training", figures="", total=None)

    def start(self, step: int, iterations: int) -> None:
        """Show the bar."""
        self._bar.update(self._task, completed=step, total=iterations)
        self._bar.start()

    def advance(self, step: int, figures: Mapping[str, float]) -> None:
        """Move the bar."""
        text = describe({"kind": "train", **figures}) + f"  ETA {clock(figures['eta'])}"
        self._bar.update(self._task, completed=step, figures=text)

    def record(self, record: Mapping[str, Any]) -> None:
        """Print validations; training records show in the bar."""
        if record["kind"] != "train":
            self.say(f"{record['step']:>7}  {describe(record)}")

    def say(self, message: str) -> None:
        """Print the message above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def reporter_for(console: Console) -> Reporter:
    """A live display where ``console`` is a terminal or a notebook, plain lines elsewhere."""
    return Live(console) if console.is_terminal or console.is_jupyter else Lines(console)


def describe(record: Mapping[str, Any]) -> str:
    """A record in a line of text."""
    if record["kind"] != "train":
        return f"{record['kind']}: {figure(record)}, before adaptation {figure(record, 'before')}"
    parts = [f"loss {record['loss']:.4f}"]
    if "accuracy" in record:
        parts.append(f"accuracy {record['accuracy']:6.2%}")
    parts.append(f"{record['tasks_per_s']:.0f} tasks/s")
    return "  ".join(parts)


def figure(record: Mapping[str, Any], which: str = "after") -> str:
    """``98.12 % ± 0.15 %`` or ``0.0312 ± 0.0020`` of a validation or test record."""
    mean, ci = record[which], record[f"{which}_ci95"]
    if record["metric"] == "accuracy":
        return f"accuracy {100 * mean:.2f} % ± {100 * ci:.2f} %"
    name = "error" if record["metric"] == "mse" else record["metric"]
    return f"{name} {mean:.4f} ± {ci:.4f}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

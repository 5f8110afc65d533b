"""A run's folder: what lies where in it, and the checks made before any work starts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fastmeta.core import files
from fastmeta.learner.config import TrainConfig

LAST, BEST = "last", "best"
MAY_CHANGE = ("data", "iterations", "threads", "device")  # on resuming; anything else would make it another run


@dataclass(frozen=True)
class Run:
    """Paths of a run: ``config.json``, ``metrics.jsonl``, ``result.json``, pictures and ``checkpoints/``."""

    folder: Path

    @property
    def config(self) -> Path:
        """The settings."""
        return self.folder / "config.json"

    @property
    def metrics(self) -> Path:
        """The log."""
        return self.folder / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The test figures."""
        return self.folder / "result.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def learning_curve(self) -> Path:
        """Picture of the log."""
        return self.folder / "learning_curve.png"

    @property
    def adaptation(self) -> Path:
        """Picture of waves before and after adaptation."""
        return self.folder / "adaptation.png"

    def read_config(self) -> TrainConfig:
        """The settings the run was started with.

        Raises:
            FileNotFoundError: this is no run folder.
            ValueError: the file is damaged.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"run: {self.folder} must be the output folder of a run, but has no config.json")
        try:
            return TrainConfig.from_json(json.loads(self.config.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"run: {self.config} must hold the settings of a run, got {error}") from error


def open_new(folder: str | os.PathLike[str], config: TrainConfig) -> Run:
    """Make the folder of a new run and write its settings.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: it holds a run already.
    """
    run = Run(files.make_folder(folder))
    if (run.checkpoints / f"{LAST}.json").exists():
        raise ValueError(f"train: out must be a fresh folder, got {folder}, which holds a run; go on with --resume")
    files.write_json(run.config, config.to_json())
    return run


def open_existing(folder: str | os.PathLike[str], config: TrainConfig) -> Run:
    """Open a run to resume it under ``config``, which replaces the stored settings where that is harmless.

    Raises:
        FileNotFoundError: there is no run in the folder.
        OSError: the folder cannot be written.
        ValueError: the settings are of another run.
    """
    run = Run(Path(folder))
    stored = run.read_config().to_json()
    files.make_folder(folder)
    for name, value in config.to_json().items():
        if value != stored[name] and name not in MAY_CHANGE:
            raise ValueError(
                f"train: {name} must stay {stored[name]!r} when {folder} is resumed, got {value!r}; "
                "leave the option out, or start a new run"
            )
    files.write_json(run.config, config.to_json())
    return run

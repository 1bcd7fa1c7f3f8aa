"""run.json: what this run is, where it ran, what was chosen for it, how it ended."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from floatline.hardware import detect
from floatline.train.rundir import RunDirectory

_PACKAGES = ("floatline", "torch", "transformers", "tokenizers", "peft", "torchdata", "numpy")


class Manifest:
    """The contents of run.json, written through on every change.

    Args:
        rundir: The locked run directory; an earlier run.json in it is continued.
    """

    def __init__(self, rundir: RunDirectory) -> None:
        self.rundir = rundir
        self.values: dict[str, Any] = rundir.read_json("run.json")
        self._before = float(self.values.get("seconds", 0.0))
        self._start = time.monotonic()

    def begin(self, command: str) -> None:
        """Note the start of this process."""
        self.values.setdefault("started", now())
        self.update(
            status="running", finished=None, error=None, command=command, versions=versions(), machine=machine()
        )

    def update(self, **values: Any) -> None:
        """Set values and write the file."""
        seconds = self._before + time.monotonic() - self._start
        self.values.update(values, seconds=seconds)
        self.rundir.write_json("run.json", self.values)

    def end(self, status: str, error: str | None = None) -> None:
        """Note how the run ended: finished, stopped (guard or user) or failed."""
        self.update(status=status, error=error, finished=now())


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return the versions of python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what this run computes on."""
    hardware = detect()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device, "name": hardware.name, "cores": os.cpu_count(), "memory_bytes": hardware.memory}

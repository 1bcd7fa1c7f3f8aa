"""Checkpoints: written atomically, checked by checksum, pruned.

A checkpoint is a directory `step-00000100` that is an ordinary Hugging Face model directory plus `trainer_state.pt`
and `manifest.json`. It is written under a temporary name; every file is flushed to disk, the manifest with the
SHA-256 of each goes last, then the directory is renamed into place. So a directory with the right name is complete
unless the disk damaged it later, and that the checksums tell.

Not covered: sharded checkpoints of several ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from floatline.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "trainer_state.pt"
_PREFIX = "step-"
_TEMPORARY = ".writing-"


def step_of(path: Path) -> int:
    """Return the update number in a checkpoint's name.

    >>> step_of(Path("checkpoints/step-00000100"))
    100
    """
    return int(path.name.removeprefix(_PREFIX))


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, oldest first, whether sound or not."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> Path:
    """Write checkpoint `step` into `directory`; it is there whole or not at all.

    Args:
        directory: Where checkpoints live; created if needed.
        step: Number of updates made.
        state: Plain values and tensors, for `load_state`.
        write_model: Called with the directory to write the model's files into.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: The files cannot be written (disk full, no permission). Earlier checkpoints are untouched.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    temporary = directory / f"{_TEMPORARY}{step:08d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_model(temporary)
        torch.save(state, temporary / STATE)
        _write_manifest(temporary, step)
        _sync_directory(temporary)
        if final.exists():  # a damaged checkpoint of the same update that was passed over on resume
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_directory(directory)
    except Exception as error:  # OSError, torch's RuntimeError and safetensors' own type all mean: not written
        shutil.rmtree(temporary, ignore_errors=True)
        raise _write_error(final, error) from error
    return final


def _write_error(path: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(path.parent if path.parent.exists() else Path.cwd()).free
    return CheckpointError(
        f"checkpoint {path} could not be written: {error} ({free / 2**20:.0f} MiB free on that disk)",
        hint="earlier checkpoints are untouched; make room or point run.dir elsewhere, then run the same command again",
    )


def _write_manifest(directory: Path, step: int) -> None:
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        _sync_file(path)
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1))
    _sync_file(manifest)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file, or None when every checksum holds."""
    manifest = path / MANIFEST
    try:
        files = json.loads(manifest.read_text())["files"]
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{manifest} cannot be read: {error}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, {expected['bytes']} were written"
        if _digest(file) != expected["sha256"]:
            return f"{file} does not match its checksum"
    return None


def newest_sound(directory: Path, on_fault: Callable[[Path, str], None]) -> Path | None:
    """Return the newest checkpoint whose checksums hold; None where there is none at all.

    Args:
        directory: Where checkpoints live.
        on_fault: Called with each damaged checkpoint that is passed over, and what is wrong with it.

    Raises:
        CheckpointError: There are checkpoints, but every one is damaged.
    """
    checkpoints = list_checkpoints(directory)
    for path in reversed(checkpoints):
        fault = find_fault(path)
        if fault is None:
            return path
        on_fault(path, fault)
    if checkpoints:
        raise CheckpointError(
            f"all {len(checkpoints)} checkpoints in {directory} are damaged",
            hint="restore one from a backup, or start anew with another run.dir",
        )
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Return the trainer state of a checkpoint, on the CPU, without running code from the file."""
    return torch.load(path / STATE, map_location="cpu", weights_only=True)


def prune(directory: Path, *, keep_last: int, keep: set[int]) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those whose step is in `keep`; return what went.

    Leftovers of writes that were cut off go too.
    """
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    old = [path for path in list_checkpoints(directory)[:-keep_last] if step_of(path) not in keep]
    for path in old:
        # Rename first: a kill halfway through a delete must not leave a damaged checkpoint behind.
        doomed = path.with_name(f"{_TEMPORARY}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return old

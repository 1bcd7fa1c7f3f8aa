"""Checkpoints: written atomically, checked by checksum, pruned.

A checkpoint is a directory `step-00000100` that is an ordinary Hugging Face model directory plus `trainer_state.pt`
and `manifest.json`. It is written under a temporary name; every file is flushed to disk, the manifest with the
SHA-256 of each goes last, then the directory is renamed into place. So a directory with the right name is complete
unless the disk damaged it later, and that the checksums tell. Of several ranks all write their parts into the same
temporary directory, which must be on a disk that all of them see, and rank 0 does the rest.

What is in it, and how it is read back, is weights.py's matter.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from floatline.errors import CheckpointError
from floatline.techniques import OneRank
from floatline.techniques.distributed.ranks import is_connection_fault

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


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return where checkpoint `step` lies."""
    return directory / f"{_PREFIX}{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints in `directory`, oldest first, whether sound or not."""
    found = [path for path in directory.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=step_of)


def save_checkpoint(
    directory: Path,
    step: int,
    state: dict[str, Any],
    write_model: Callable[[Path], None],
    ranks: OneRank | None = None,
) -> Path:
    """Write checkpoint `step` into `directory`; it is there whole or not at all. Every rank calls this.

    Args:
        directory: Where checkpoints live; created if needed.
        step: Number of updates made.
        state: Plain values and tensors, for `load_state`; rank 0's is written.
        write_model: Called on every rank with the directory to write the model's files into.
        ranks: Who writes together; None is this process alone.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: The files cannot be written (disk full, no permission). Earlier checkpoints are untouched.
    """
    ranks = ranks or OneRank()
    final = checkpoint_path(directory, step)
    temporary = directory / f"{_TEMPORARY}{step:08d}"
    try:
        ranks.on_first(lambda: _begin(temporary))
        ranks.together(lambda: write_model(temporary))
        ranks.on_first(lambda: _complete(temporary, final, step, state))
    except Exception as error:  # OSError, torch's RuntimeError and safetensors' own type all mean: not written
        if ranks.size > 1 and is_connection_fault(error):
            raise
        free = shutil.disk_usage(directory if directory.exists() else Path.cwd()).free  # before the rest is removed
        shutil.rmtree(temporary, ignore_errors=True)
        raise _write_error(final, error, free, told=ranks.rank > 0) from error
    return final


def _begin(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def _complete(temporary: Path, final: Path, step: int, state: dict[str, Any]) -> None:
    """Write what is left, flush everything to disk and give the checkpoint its name."""
    torch.save(state, temporary / STATE)
    _write_manifest(temporary, step)
    _sync_directory(temporary)
    if final.exists():  # a damaged checkpoint of the same update that was passed over on resume
        shutil.rmtree(final)
    temporary.rename(final)
    _sync_directory(final.parent)


def _write_error(path: Path, error: Exception, free: int, told: bool) -> CheckpointError:
    full = getattr(error, "errno", None) == errno.ENOSPC or free < 2**20
    why = "the disk is full" if full else f"{error} ({free / 2**20:.0f} MiB were free on that disk)"
    failure = CheckpointError(
        f"checkpoint {path} could not be written: {why}",
        hint="earlier checkpoints are untouched; make room, then run the same command again",
    )
    failure.told = told
    return failure


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
        expectations = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{manifest} cannot be read: {error}"
    if STATE not in files:
        return f"{manifest} does not list {STATE}"
    for name, size, digest in expectations:
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, {size} were written"
        if _digest(file) != digest:
            return f"{file} does not match its checksum"
    return None


def newest_sound(directory: Path) -> Path | None:
    """Return the newest checkpoint whose checksums hold; None where there is none at all.

    Raises:
        CheckpointError: There are checkpoints, but every one is damaged.
    """
    checkpoints = list_checkpoints(directory)
    sound = next((path for path in reversed(checkpoints) if find_fault(path) is None), None)
    if checkpoints and sound is None:
        raise CheckpointError(
            f"all {len(checkpoints)} checkpoints in {directory} are damaged: {find_fault(checkpoints[-1])}",
            hint="restore one from a backup, or start anew with another run.dir",
        )
    return sound


def set_damaged_aside(directory: Path, sound: Path | None) -> list[tuple[Path, str]]:
    """Rename the checkpoints that are newer than the `sound` one to `damaged-*`, so that they count for nothing.

    Returns:
        For each its new path, and what is wrong with it.
    """
    aside = []
    for path in list_checkpoints(directory):
        if sound is not None and step_of(path) > step_of(sound):
            fault = find_fault(path) or "newer than the checkpoint in use"
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            aside.append((target, fault))
    return aside


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

"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from floatline.errors import RunDirectoryError


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file that appears complete or not at all; missing directories are made, and links are followed.

    Raises:
        RunDirectoryError: It cannot be written, or is there and no file: a device would be replaced.
    """
    check_writable(path)
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise RunDirectoryError(
            f"cannot write {path}: {error.strerror}", hint="give a path you may write to, on a disk with room"
        ) from error
    return path


def check_writable(path: str | Path) -> None:
    """Say beforehand that a file cannot be written.

    Raises:
        RunDirectoryError: It is a directory, a device or a pipe, or lies where nothing may be written.
    """
    path = Path(path)
    try:
        reason = _why_not(path)
    except OSError as error:  # a name that is too long, a directory that one may not enter
        reason = error.strerror or str(error)
    if reason:
        raise RunDirectoryError(f"cannot write {path}: {reason}", hint="give a path you may write to")


def _why_not(path: Path) -> str:
    if path.is_dir():
        return "it is a directory"
    if path.exists() and not path.is_file():
        return "it is a device or a pipe, not a file"
    near = next(parent for parent in path.absolute().parents if parent.exists())
    return "" if near.is_dir() and os.access(near, os.W_OK) else f"{near} is not a directory that you may write to"

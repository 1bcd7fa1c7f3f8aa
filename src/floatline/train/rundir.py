"""The run directory: one run, one writer, everything in plain files.

    recipe.yaml      the resolved recipe, which runs the same again
    plan.json        with memory: auto, the plan it was chosen by (memory.py)
    run.json         status, machine, versions, automatic choices with reasons, data counts, result
    metrics.jsonl    one line an update, an evaluation or a fault
    samples.jsonl    answers of the last generation
    tensorboard/     the same curves as events
    checkpoints/     see checkpoint.py
    report.html      the page for people

A lock keeps a second run out. Files that are rewritten are replaced atomically; metrics are appended, and cut back
to what was there at the checkpoint on resume. Of several ranks, rank 0 holds the lock and writes; the others have a
`SilentRunDirectory`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from floatline.errors import RunDirectoryError
from floatline.techniques import OneRank


class RunDirectory:
    """A locked run directory.

    Args:
        path: Created if needed.

    Raises:
        RunDirectoryError: Another process uses it, it is a file, or it cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self._metrics: TextIO | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except (FileExistsError, NotADirectoryError):
            raise RunDirectoryError(f"{self.path} is not a directory", hint="choose another run.dir") from None
        except OSError as error:
            raise RunDirectoryError(
                f"run directory {self.path} cannot be written: {error.strerror}",
                hint="choose another run.dir, or give yourself the permission",
            ) from None
        self._take_lock()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            raise RunDirectoryError(
                f"run directory {self.path} is in use by process {holder}",
                hint="wait for that run, or choose another run.dir",
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def close(self) -> None:
        """Release the lock."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_text(self, name: str, text: str) -> None:
        """Replace file `name` atomically.

        Raises:
            RunDirectoryError: The disk is full or not writable; the old file is as it was.
        """
        temporary = self.path / f".{name}.writing"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            raise self._write_error(name, error) from None

    def write_json(self, name: str, value: Any) -> None:
        """Replace file `name` by `value` as JSON, atomically."""
        self.write_text(name, json.dumps(value, indent=1, default=str) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in file `name`, {} when it is missing or unreadable."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            if self._metrics is None:
                self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise self._write_error("metrics.jsonl", error) from None

    def logged(self) -> int:
        """Return the bytes in metrics.jsonl, for a checkpoint."""
        path = self.path / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, step: int, logged: int | None = None) -> None:
        """Drop what was logged after a checkpoint.

        Args:
            step: Its update.
            logged: The bytes that were logged when it was written: a fault that it rests on may have a later number.
                None, or bytes that the file does not have any more: what has a later number goes, and the final test.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        if logged is not None and path.read_bytes()[:logged][-1:] == b"\n" and path.stat().st_size >= logged:
            os.truncate(path, logged)
            return
        kept = [
            line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if _step_in(line) <= step
        ]
        self.write_text("metrics.jsonl", "".join(line + "\n" for line in kept))

    def event_writer(self, first_step: int) -> Any:
        """Return the writer of TensorBoard events; those after `first_step` are written anew."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.path / "tensorboard", purge_step=first_step + 1, max_queue=1000, flush_secs=10)

    def note_lost_rank(self, note: Callable[[RunDirectory], None]) -> bool:
        """Let a rank write how the run ended because another is gone; says whether it could."""
        note(self)
        return True

    def _write_error(self, name: str, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.path / name} could not be written: {error.strerror}",
            hint="checkpoints are untouched; make room, then run the same command again",
        )


class SilentRunDirectory(RunDirectory):
    """The null object: of all ranks but the first, it writes nothing and reads nothing.

    Args:
        path: Where the run directory is; it need not exist yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / "checkpoints"

    def close(self) -> None:
        pass

    def write_text(self, name: str, text: str) -> None:
        pass

    def read_json(self, name: str) -> dict[str, Any]:
        return {}

    def log(self, record: dict[str, Any]) -> None:
        pass

    def logged(self) -> int:
        return 0

    def cut_metrics(self, step: int, logged: int | None = None) -> None:
        pass

    def event_writer(self, first_step: int) -> Any:
        return None

    def note_lost_rank(self, note: Callable[[RunDirectory], None]) -> bool:
        """Where the rank that held the lock is the one that is gone, take its place."""
        try:
            with RunDirectory(self.path) as mine:
                note(mine)
                return True
        except RunDirectoryError:
            return False


def open_run_directory(path: str | Path, ranks: OneRank) -> RunDirectory:
    """Return the run directory: locked on rank 0, silent on the others.

    Raises:
        RunDirectoryError: On every rank, where rank 0 cannot have it.
    """
    held: list[RunDirectory] = []
    ranks.on_first(lambda: held.append(RunDirectory(path)))
    return held[0] if held else SilentRunDirectory(path)


def _step_in(line: str) -> float:
    try:
        record = json.loads(line)
        return float("inf") if record.get("split") == "test" else float(record["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

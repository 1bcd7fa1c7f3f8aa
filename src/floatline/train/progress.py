"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere. All on stderr."""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressView(Protocol):
    """Shows the newest step record; `say` prints a line that stays."""

    def show(self, record: dict[str, Any], skipped: int) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_view(console: Console, steps: int, done: int) -> ProgressView:
    """Return a bar where `console` is a terminal, else lines."""
    if console.is_terminal:
        return Bar(console, steps, done)
    return Lines(console, steps)


def describe(record: dict[str, Any], skipped: int) -> str:
    """Return one step record as a short text: loss, gradient norm, speed, memory, skipped updates."""
    loss = record["loss"]
    parts = [
        f"loss {loss:.4f}" if math.isfinite(loss) else f"loss {loss}",
        f"grad {record['grad_norm']:.2f}",
        f"{record['tokens_per_s']:,.0f} tok/s",
        f"{record['memory_bytes'] / 2**30:.2f} GiB",
    ]
    if skipped:
        parts.append(f"{skipped} skipped")
    return "  ".join(parts)


class Bar:
    """A rich progress bar with time left."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=2,
        )
        self.task = self.progress.add_task("train", total=steps, completed=done, status="")
        self.progress.start()
        self._next = 0.0

    def show(self, record: dict[str, Any], skipped: int) -> None:
        now = time.monotonic()
        if now >= self._next or record["step"] == self.progress.tasks[0].total:
            self._next = now + 0.25
            self.progress.update(self.task, completed=record["step"], status=describe(record, skipped))

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self.progress.stop()


class Lines:
    """Plain lines for logs: at most one every five seconds."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self._next = 0.0

    def show(self, record: dict[str, Any], skipped: int) -> None:
        now = time.monotonic()
        if now >= self._next or record["step"] == self.steps:
            self._next = now + 5
            self.say(f"update {record['step']}/{self.steps}  {describe(record, skipped)}")

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        pass

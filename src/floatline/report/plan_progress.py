"""What a person sees while a plan or an audit is made, on stderr: a moving bar, a line now and then without a terminal.

What the user's own Python code prints goes there too, for stdout holds the answer alone; and where it changes the
working directory that is changed back, for the files of the answer have relative names.

How many trials a search takes is not known before, so the bar says what is tried and how long it has taken.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_EVERY = 2.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def planning(console: Console | None = None, word: str = "plan") -> Iterator[Callable[[str, int], None]]:
    """Show what is tried while the context is active; what it yields is a plan's `progress`.

    Args:
        console: Where to; None is stderr.
        word: What every line begins with.
    """
    console = console or Console(stderr=True)
    with redirect_stdout(sys.stderr), _here(), _shown(console, word) as progress:
        yield progress


def _here() -> AbstractContextManager[object]:
    """Return a context that comes back to this directory; of one that was removed there is no way back."""
    return chdir(".") if os.path.exists(".") else nullcontext()


@contextmanager
def _shown(console: Console, word: str) -> Iterator[Callable[[str, int], None]]:
    if not console.is_terminal:
        yield _lines(console, word)
        return
    bar = Progress(TextColumn(word), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"),
                   console=console, transient=True, refresh_per_second=4)  # fmt: skip
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what, done: bar.update(task, description=_plain(what))


def _plain(what: str) -> str:
    return what.replace("[", r"\[")


def _lines(console: Console, word: str) -> Callable[[str, int], None]:
    begun = time.monotonic()
    told = [0.0]

    def show(what: str, done: int) -> None:
        now = time.monotonic()
        if now >= told[0]:
            told[0] = now + _EVERY
            console.print(f"{word}: {what} ({now - begun:.0f} s)", highlight=False, markup=False, soft_wrap=True)

    return show

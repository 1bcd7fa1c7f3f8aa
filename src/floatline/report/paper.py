"""A sheet of plain text: lines and tables without colour, cursor movement or mark-up.

What a model or a data file says may hold control characters, which a terminal would obey; they are shown as `?`.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 110
"""Columns of a report, at most."""


class Paper:
    """Collects lines and tables, without colour, and with no control character but the line's end."""

    def __init__(self, width: int = WIDTH) -> None:
        import rich.console

        self.file = io.StringIO()
        plain: dict[str, Any] = {"color_system": None, "force_terminal": False}
        plain |= {"highlight": False, "markup": False, "emoji": False}
        self.console: Console = rich.console.Console(file=self.file, width=width, **plain)

    def line(self, text: str = "") -> None:
        """Add a line, folded where it is too long."""
        self.console.print(clean(text))

    def table(
        self, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Collection[int] = ()
    ) -> None:
        """Add a table; the columns at the places in `numeric` are set flush right."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for place, heading in enumerate(headings):
            table.add_column(clean(heading), overflow="fold", justify="right" if place in numeric else "left")
        for row in rows:
            table.add_row(*(clean(cell) for cell in row))
        self.line()
        if title:
            self.line(title)
        self.console.print(table)

    def block(self, text: str) -> None:
        """Add lines as they are, each on its own and never folded: what is meant to be copied."""
        for line in text.splitlines():
            self.console.print("".join(char if char.isprintable() else "?" for char in line), soft_wrap=True)

    def text(self) -> str:
        """Return all of it; it ends with a newline."""
        return "\n".join(line.rstrip() for line in self.file.getvalue().splitlines()) + "\n"


def clean(text: str) -> str:
    """Return text on one line, in which nothing can command a terminal.

    >>> clean("a\\tb\\x1b[31m")
    'a b?[31m'
    """
    return "".join(char if char.isprintable() else " " if char.isspace() else "?" for char in text)

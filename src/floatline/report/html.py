"""What all pages share: templates with the same styles and macros, and files that appear complete or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from floatline.errors import RunDirectoryError
from floatline.report.need import need
from floatline.report.units import number_text, percent_text


def render_template(name: str, **values: Any) -> str:
    """Fill in a page's template; the macros of figures.html stand before it.

    Args:
        name: File in this package.
        values: What the template shows; all text is escaped.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number_text, "percent": percent_text}
    template = environment.from_string(resource("figures.html") + resource(name))
    return str(template.render(style=resource("page.css"), **values))


def resource(name: str) -> str:
    """Return the text of a file of this package."""
    return files("floatline.report").joinpath(name).read_text(encoding="utf-8")


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file that appears complete or not at all; missing directories are made.

    Raises:
        RunDirectoryError: It cannot be written.
    """
    path = Path(path)
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
        RunDirectoryError: It is a directory, or lies where nothing may be written.
    """
    path = Path(path)
    near = next(parent for parent in (path.absolute().parent, *path.absolute().parents) if parent.exists())
    if path.is_dir() or not near.is_dir() or not os.access(near, os.W_OK):
        reason = "it is a directory" if path.is_dir() else f"{near} is not a directory that you may write to"
        raise RunDirectoryError(f"cannot write {path}: {reason}", hint="give a path you may write to")

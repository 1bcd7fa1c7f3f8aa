"""Write docs/reference from the code: commands, recipe keys, formats, GPUs. `--check` says what is out of date."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

HERE = Path(__file__).parent / "reference"


def commands() -> str:
    """`--help` of every command, at a fixed width."""
    from floatline.cli import app

    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    parts = ["# Commands\n", _help([])]
    for name in names:
        parts += [f"## floatline {name}\n", _help([name])]
    return "\n".join(parts)


def _help(command: list[str]) -> str:
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100"}
    line = [sys.executable, "-m", "floatline", *command, "--help"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    return f"```\n{done.stdout.strip()}\n```\n"


def recipe() -> str:
    """Every key of a recipe with type, default and meaning."""
    from floatline.train.recipe import Recipe, Section

    lines = ["# Recipe keys\n", "`null` means: decided for you, and the reason is printed.\n"]
    lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, field in Recipe.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            lines += [_row(f"{name}.{key}", inner) for key, inner in annotation.model_fields.items()]
        else:
            lines.append(_row(name, field))
    return "\n".join(lines) + "\n"


def _row(key: str, field: Any) -> str:
    default = "required" if field.is_required() else _plain(field.default)
    return f"| `{key}` | {_type(field.annotation)} | {default} | {field.description or ''} |"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if origin is tuple and get_args(annotation)[-1] is Ellipsis:
        return f"list of: {_type(get_args(annotation)[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(inner) for inner in get_args(annotation) if inner is not type(None))
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    names = {int: "integer", float: "number", str: "text", bool: "true, false"}
    if origin is dict:
        return "name: settings"
    return names.get(annotation, "two numbers" if origin is tuple else str(annotation))


def formats() -> str:
    """The table of number formats."""
    from floatline.formats import format_rows

    rows = format_rows()
    lines = ["# Number formats\n", "Computed from the bit layout (`floatline formats`).\n"]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for row in rows:
        lines.append("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def hardware() -> str:
    """The catalog of GPUs with the precision that `auto` picks."""
    from floatline.hardware import CATALOG
    from floatline.precision import choose

    lines = [
        "# Hardware\n",
        "Published figures; dense TFLOPS; memory as torch reports it (the smaller of what logs show).\n",
    ]
    lines += ["| name | capability | memory GiB | GB/s | TFLOPS | `auto` precision |", "|---|---|---|---|---|---|"]
    for gpu in CATALOG.values():
        rates = ", ".join(f"{name} {rate:g}" for name, rate in gpu.tflops.items())
        capability = "{}.{}".format(*(gpu.capability or (0, 0)))
        lines.append(
            f"| {gpu.name} | {capability} | {gpu.memory / 2**30:.2f} | {gpu.bandwidth / 1e9:g} | {rates} "
            f"| {choose(gpu).policy} |"
        )
    return "\n".join(lines) + "\n"


def techniques() -> str:
    """Every technique with its settings, in the order in which they are applied."""
    from floatline.techniques import HOMES, technique_class

    classes = sorted((technique_class(name) for name in HOMES), key=lambda kind: (kind.stage, kind.order))
    lines = [
        "# Techniques\n",
        "In the order in which a step applies them, whichever order they are given in. In a recipe: "
        "`techniques: {NAME: {SETTING: VALUE}}`, or `techniques.NAME=true` on the command line; in Python: "
        '`TrainStep(techniques=["NAME(setting=value)"])` or `fl.techniques.CLASS(...)`. What each is and when it pays: '
        "[techniques](../concepts/techniques.md).\n",
    ]
    for kind in classes:
        lines += _technique(kind, classes)
    return "\n".join(lines) + "\n"


def _technique(kind: Any, classes: list[Any]) -> list[str]:
    summary, arguments = _docstring(kind)
    exact = "bit for bit the plain step's" if kind.exact else "equal to rounding, or another optimizer or model"
    lines = [f"## {kind.name}\n", f"`fl.techniques.{kind.__name__}`: {summary} Results: {exact}.\n"]
    if fields(kind):
        lines += ["| setting | values | default | meaning |", "|---|---|---|---|"]
        hints = get_type_hints(kind)
        for field in fields(kind):
            default = "required" if field.default is MISSING else f"`{_plain(field.default)}`"
            meaning = arguments.get(field.name, "").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {_type(hints[field.name])} | {default} | {meaning} |")
        lines.append("")
    conflicts = {other.name: other.conflicts[kind.name] for other in classes if kind.name in other.conflicts}
    conflicts |= kind.conflicts
    lines += [f"- not with `{other}`: {reason}" for other, reason in conflicts.items()]
    return [*lines, ""] if conflicts else lines


def _docstring(kind: Any) -> tuple[str, dict[str, str]]:
    """Return the first line of a class's docstring, and its Args by name."""
    text = inspect.cleandoc(kind.__doc__)
    _, _, tail = text.partition("\nArgs:\n")
    arguments: dict[str, str] = {}
    name = ""
    for line in re.split(r"\n(?=\S)", tail)[0].splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name, arguments[match[1]] = match[1], match[2]
        elif name and line.strip():
            arguments[name] += f" {line.strip()}"
    return text.splitlines()[0], arguments


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "recipe.md": recipe,
    "formats.md": formats,
    "hardware.md": hardware,
    "techniques.md": techniques,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is out of date")
    check = parser.parse_args().check
    HERE.mkdir(exist_ok=True)
    stale = [name for name, make in PAGES.items() if not _is_current(HERE / name, make())]
    if check and stale:
        print(f"out of date: {', '.join(stale)}\nhint: run `make docs`", file=sys.stderr)
        return 1
    for name in stale:
        (HERE / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"wrote {HERE / name}")
    return 0


def _is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())

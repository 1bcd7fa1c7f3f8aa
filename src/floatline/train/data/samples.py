"""Read the ecosystem's `messages` JSONL: one conversation a line, images as files.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]},
                  {"role": "assistant", "content": "7"}], "kind": "digit"}

An image is named where it stands (`{"type": "image", "image": PATH}` or OpenAI's `image_url`), or in a list beside the
messages: `"images": ["a.png"]` with one `<image>` in a string content, or one bare `{"type": "image"}` part, for each.
Relative paths start at the JSONL's own directory. Keys that are not known here are kept in `Sample.extra`.

A line is parsed completely or refused with its number, so that nothing later has to ask what shape a sample has.
Whether the images can be opened is not looked at here (checks.py).

Not covered: images by http or data URL, video, audio, tool calls, ShareGPT's `conversations`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from floatline.errors import DataError
from floatline.train.data.parse import SHAPE, BadLine, Message, parse_messages, parse_record, show


@dataclass(frozen=True)
class Sample:
    """One conversation that ends with an answer.

    Attributes:
        messages: At least one user turn, then an assistant turn with text at the end.
        kind: The group in which evaluation counts it, None without one.
        file: The JSONL as the user named it.
        line: Line number in it, the first is 1.
        extra: The line's other keys.
    """

    messages: tuple[Message, ...]
    kind: str | None
    file: Path
    line: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[Path, ...]:
        """All image files, in the order in which the conversation shows them."""
        return tuple(path for message in self.messages for path in message.images)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, problem: str, hint: str = "") -> DataError:
        """Return the DataError that names this sample's file and line."""
        return DataError(f"{self.where}: {problem}", hint=hint)


@dataclass(frozen=True)
class BadSample:
    """A line that cannot be used: where, why, and what to do."""

    file: Path
    line: int
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def read_samples(path: str | Path, *, kind_key: str = "kind", bad: list[BadSample] | None = None) -> list[Sample]:
    """Read a messages JSONL; blank lines are allowed.

    Args:
        path: The file.
        kind_key: Key of a line that holds its kind.
        bad: When given, lines with a wrong shape are appended to it instead of raised.

    Returns:
        The samples in the file's order.

    Raises:
        DataError: No such file, a directory, not readable, no line in it, or (without `bad`) a line that is not
            UTF-8, not JSON or has a wrong shape: file, line, the bad value, what to do.
    """
    file = Path(path)
    samples: list[Sample] = []
    lines = 0
    for number, raw in _lines(file):
        lines += 1
        try:
            samples.append(_parse(raw, file, number, kind_key))
        except BadLine as problem:
            found = BadSample(file, number, problem.reason, problem.hint)
            if bad is None:
                raise DataError(str(found), hint=found.hint) from None
            bad.append(found)
    if not lines:
        raise DataError(f"{file} holds no samples", hint=f"write one line for each sample: {SHAPE}")
    return samples


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file} does not exist", hint="data paths are relative to the working directory") from None
    except IsADirectoryError:
        raise DataError(f"{file} is a directory", hint="name the JSONL file in it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}", hint="check the path and its permissions") from None
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            yield number, raw


def _parse(raw: bytes, file: Path, number: int, kind_key: str) -> Sample:
    record = parse_record(raw)
    messages = parse_messages(record, file.parent)
    kind = record.get(kind_key)
    if kind is not None and not isinstance(kind, str):
        raise BadLine(f"{kind_key} is {show(kind)}, not a string", f"write {json.dumps(str(kind))} or leave it out")
    known = {"messages", "images", kind_key}
    return Sample(messages, kind, file, number, {key: value for key, value in record.items() if key not in known})

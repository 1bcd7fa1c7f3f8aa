"""Parse one line of a messages JSONL into turns of texts and image files.

Every shape that is not understood raises `BadLine` with the place in the line (`messages[1].content[0].type`), the bad
value and what to write instead; nothing else escapes, whatever the JSON holds.

Not covered: where the line stands (samples.py adds file and number), whether image files exist (checks.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROLES = ("system", "user", "assistant")
PLACEHOLDER = "<image>"
SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        parts: In order: texts (str) and image files (absolute Path).
    """

    role: str
    parts: tuple[str | Path, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Path, ...]:
        return tuple(part for part in self.parts if isinstance(part, Path))


class BadLine(Exception):
    """What is wrong with a line, and the hint; `samples.read_samples` adds where."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def parse_record(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises:
        BadLine: Not UTF-8, not JSON, or not an object.
    """
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise BadLine(f"byte {byte:#04x} at column {error.start + 1} is not UTF-8", "save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError: also an integer with thousands of digits
        at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadLine(
            f"not valid JSON ({at}): {_cut(raw.decode('utf-8').strip())}",
            "each line must be one complete JSON object; see whether it is JSON over several lines",
        ) from None
    if not isinstance(record, dict):
        raise BadLine(f"the line is {show(record)}, not an object", f"write {SHAPE}")
    return record


def parse_messages(record: dict[str, Any], folder: Path) -> tuple[Message, ...]:
    """Return the turns of a line.

    Args:
        record: The line's object.
        folder: Where relative image paths start.

    Raises:
        BadLine: A wrong shape, images and placeholders that do not match, or no answer at the end.
    """
    listed = _listed_images(record, folder)
    messages = tuple(_message(value, f"messages[{i}]", folder, listed) for i, value in enumerate(_turns(record)))
    left = sum(1 for _ in listed)
    if left:
        total = len(record["images"])
        raise BadLine(
            f"images lists {total} files, but the messages show only {total - left}",
            f"write one {PLACEHOLDER} for each image into the user's content",
        )
    _check_order(messages)
    return messages


def _turns(record: dict[str, Any]) -> list[Any]:
    if "messages" not in record:
        shape = "turn its conversations into messages" if "conversations" in record else "write"
        raise BadLine(f"messages is missing; the keys are {show(list(record))}", f"{shape}: {SHAPE}")
    turns = record["messages"]
    if not isinstance(turns, list) or not turns:
        raise BadLine(f"messages is {show(turns)}, not a list of turns", f"write {SHAPE}")
    return turns


def _listed_images(record: dict[str, Any], folder: Path) -> Iterator[Path]:
    images = record.get("images")
    if images is None:
        return iter(())
    if not isinstance(images, list):
        raise BadLine(f"images is {show(images)}, not a list of paths", 'write "images": ["a.png"]')
    return iter([_image_path(image, f"images[{place}]", folder) for place, image in enumerate(images)])


def _message(value: Any, name: str, folder: Path, listed: Iterator[Path]) -> Message:
    if not isinstance(value, dict):
        raise BadLine(f"{name} is {show(value)}, not an object", f"write {SHAPE}")
    role = value.get("role")
    if role not in ROLES:
        raise BadLine(f"{name}.role is {show(role)}", f"allowed: {', '.join(ROLES)}")
    content = value.get("content")
    if isinstance(content, str):
        return Message(role, tuple(_split(_text(content, f"{name}.content"), f"{name}.content", listed)))
    if not isinstance(content, list):
        raise BadLine(f"{name}.content is {show(content)}", "write a string, or a list of text and image parts")
    parts = (_part(part, f"{name}.content[{index}]", folder, listed) for index, part in enumerate(content))
    return Message(role, tuple(parts))


def _split(text: str, name: str, listed: Iterator[Path]) -> Iterator[str | Path]:
    """Put the next listed image in the place of each placeholder."""
    first, *rest = text.split(PLACEHOLDER)
    if first:
        yield first
    for piece in rest:
        yield _next_listed(listed, f"{name} has {PLACEHOLDER}")
        if piece:
            yield piece


def _next_listed(listed: Iterator[Path], who: str) -> Path:
    found = next(listed, None)
    if found is None:
        raise BadLine(f"{who}, but the line's images list has no file left for it", 'add it: "images": ["a.png"]')
    return found


def _part(part: Any, name: str, folder: Path, listed: Iterator[Path]) -> str | Path:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), f"{name}.text")
    if kind == "image":
        if part.get("image") is None:
            return _next_listed(listed, f"{name} names no image")
        return _image_path(part["image"], f"{name}.image", folder)
    if kind == "image_url":
        url = part.get("image_url")
        return _image_path(url.get("url") if isinstance(url, dict) else url, f"{name}.image_url.url", folder)
    if isinstance(part, dict):
        raise BadLine(f"{name}.type is {show(kind)}", "allowed: text, image, image_url")
    raise BadLine(f"{name} is {show(part)}, not an object", 'write {"type": "text", "text": "..."}')


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadLine(f"{name} is {show(value)}, not a string", "write the text in quotes")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise BadLine(f"{name} holds half a surrogate pair: {show(value)}", "write the character itself, in UTF-8")
    return value


def _image_path(value: Any, name: str, folder: Path) -> Path:
    text = _text(value, name)
    if text.startswith(("http:", "https:", "data:")):
        raise BadLine(f"{name} is {show(text)}, not a file", "download the images and name the files")
    try:
        path = unquote(urlsplit(text).path) if text.startswith("file:") else text
    except ValueError as error:
        raise BadLine(f"{name} is {show(text)}: {error}", "write the plain path of the file") from None
    if not path or "\0" in path:
        raise BadLine(f"{name} is {show(text)}, not a path", "name the image file")
    return Path(os.path.abspath(folder / path))


def _check_order(messages: tuple[Message, ...]) -> None:
    for place, message in enumerate(messages):
        if message.role == "assistant" and message.images:
            raise BadLine(f"messages[{place}] is an answer with an image", "put images into user turns")
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise BadLine(f"no assistant turn; the roles are {', '.join(roles)}", "end each line with the answer to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise BadLine("no user turn before the first answer", "put the question before the answer")
    if roles[-1] != "assistant":
        raise BadLine(f"the last turn is {roles[-1]!r}, not an answer", "end each line with an assistant turn")
    for place, message in enumerate(messages):
        if message.role == "assistant" and not message.text.strip():
            raise BadLine(f"messages[{place}] is an empty answer: {show(message.text)}", "write the answer to learn")


def show(value: Any) -> str:
    """Return a value as JSON on one line, cut to a readable length, for an error text.

    >>> show({"role": "tool"})
    '{"role": "tool"}'
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return _cut(text)


def _cut(text: str, limit: int = 60) -> str:
    start = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in start)

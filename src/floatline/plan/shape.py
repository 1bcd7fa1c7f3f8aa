"""The sizes of one batch, as asked and as filled in.

A `Shape` holds what the user asked for; None leaves a size to the model's own description. `Filling` takes the open
sizes one by one and keeps the reason of each, so that nothing is chosen silently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from floatline.errors import ConfigError

MOST = 2**31 - 1
"""Largest count of anything; more is a slip of the finger, and torch's sizes end not far above."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one batch; None is filled in from the model's description.

    Args:
        batch: Samples.
        seq: Tokens a sample; of an encoder-decoder's encoder; of a speech model's transcript.
        target: Tokens a sample of an encoder-decoder's decoder.
        image: (height, width) in pixels, before the model family's own resizing.
        images: Images a sample; 0 trains a vision-language model on text alone.
        seconds: Length of an audio sample, at 16 kHz.

    Raises:
        ConfigError: A size below 1 (`images` below 0), or one that no tensor has.
    """

    batch: int | None = None
    seq: int | None = None
    target: int | None = None
    image: tuple[int, int] | None = None
    images: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "seq", "target", "images"):
            value, least = getattr(self, name), 0 if name == "images" else 1
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name}={value!r} is not a whole number of {least} or more", hint="give a count")
            if value is not None and value > MOST:
                raise ConfigError(f"{name}={value} is more than any tensor holds, {MOST}", hint="give a smaller count")
        if self.image is not None and (
            len(self.image) != 2 or not all(isinstance(n, int) and n > 0 for n in self.image)
        ):
            raise ConfigError(f"image={self.image!r} is not two whole numbers above 0", hint="give (height, width)")
        if self.seconds is not None and not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds!r} is not above 0", hint="give the length of an audio sample")

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        shown = ((name, f"{v[0]}x{v[1]}" if name == "image" else f"{v:g}") for name, v in given if v is not None)
        return ", ".join(f"{name} {value}" for name, value in shown)


def parse_image(text: str) -> tuple[int, int]:
    """Read "HEIGHTxWIDTH", or one number for a square.

    >>> parse_image("1024x768"), parse_image("448")
    ((1024, 768), (448, 448))

    Raises:
        ConfigError: It is neither.
    """
    found = re.fullmatch(r"(\d+)(?:[xX×](\d+))?", text.strip())
    if found is None:
        raise ConfigError(f"image {text!r} is not HEIGHTxWIDTH", hint="write it like 1024x1024, or 448 for a square")
    height, width = found.group(1), found.group(2) or found.group(1)
    return int(height), int(width)


@dataclass(frozen=True)
class SizeChoice:
    """One size that was left open, and why it is what it is."""

    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = "x".join(map(str, self.value)) if isinstance(self.value, tuple) else self.value
        return f"{self.key} {value}: {self.reason}"


class Filling:
    """A shape being filled in, with the choices made so far.

    Args:
        asked: The shape as the user gave it.
        model: What the model is called in error messages.
    """

    def __init__(self, asked: Shape, model: str) -> None:
        self.shape, self.model = asked, model
        self.choices: list[SizeChoice] = []

    def take(self, key: str, default: Any, reason: str) -> Any:
        """Return the size `key`, set to `default` for `reason` where it is open."""
        if getattr(self.shape, key) is None:
            self.shape = replace(self.shape, **{key: default})
            self.choices.append(SizeChoice(key, default, reason))
        return getattr(self.shape, key)

    def length(self, key: str, default: int, reason: str, limit: int | None, limit_name: str) -> int:
        """Return a length in tokens that stays within the model's position limit.

        Raises:
            ConfigError: It was asked to be longer than `limit`.
        """
        if limit is not None and limit < default:
            default, reason = limit, f"the longest it takes ({limit_name})"
        value = int(self.take(key, default, reason))
        if limit is not None and value > limit:
            raise ConfigError(
                f"{key}={value} is over the {limit} positions of {self.model} ({limit_name}={limit})",
                hint=f"use {key}={limit} or less; a longer context needs a config that says so",
            )
        return value

    def batch(self) -> int:
        """Return the samples a batch, 1 where they are left open."""
        return int(self.take("batch", 1, "the least; raise it when it fits"))

    def refuse(self, *keys: str) -> None:
        """Raise for sizes that mean nothing to this model.

        Raises:
            ConfigError: One of `keys` was given.
        """
        given = [key for key in keys if getattr(self.shape, key) is not None]
        if given:
            raise ConfigError(
                f"{self.model} takes no {given[0]}, but {given[0]}={getattr(self.shape, given[0])} was given",
                hint=f"leave {' and '.join(given)} out",
            )

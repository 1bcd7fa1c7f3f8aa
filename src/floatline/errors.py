"""The exception tree.

Every error a user can cause carries two texts: what is wrong (with the bad value and what is allowed) and a
`hint`, the next action. The command line prints both and exits with `exit_code`: 2 for the user's mistake, 1 when
the answer to the user's question is "no" (a run that was stopped by its guard).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FloatlineError(Exception):
    """Base of all errors that Floatline raises on purpose.

    Args:
        message: What is wrong: the bad value and what is allowed.
        hint: The next action, one sentence; empty when the message says it all.
    """

    exit_code = 2
    told = False
    """True where another process of the run shows this error to the user."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(FloatlineError, ValueError):
    """A setting that is unknown, malformed or out of range."""


class PrecisionError(ConfigError):
    """A precision that cannot be parsed, is illegal on this hardware, or does not fit the model."""


class DataError(FloatlineError, ValueError):
    """A sample, file or line of the training data that cannot be used."""


class ModelError(FloatlineError, ValueError):
    """A model directory that cannot be loaded or does not fit the data."""


class TraceError(FloatlineError, ValueError):
    """A record of allocations that no program can have made."""


class CheckpointError(FloatlineError, RuntimeError):
    """A checkpoint that cannot be written or read back."""


class BundleError(FloatlineError, RuntimeError):
    """A bundle of a condemned step that cannot be written, read, or put on a model."""


class RunDirectoryError(FloatlineError, RuntimeError):
    """A run directory that is in use, not writable or belongs to another run."""


class NonFiniteError(FloatlineError, ArithmeticError):
    """Training was stopped because too many updates were not finite."""

    exit_code = 1


class MemoryExceededError(FloatlineError, RuntimeError):
    """The run does not fit the device's memory."""

    exit_code = 1


class RankLostError(FloatlineError, RuntimeError):
    """One of the processes that train together is gone."""

    exit_code = 1


class FloatlineWarning(UserWarning):
    """Something worked, but not as the user probably meant it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest known words, or lists all of them when none is near.

    >>> did_you_mean("precison", ["precision", "hardware"])
    "did you mean 'precision'?"
    >>> did_you_mean("xyz", ["a", "b"])
    'allowed: a, b'
    """
    names = list(known)
    near = get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "allowed: " + ", ".join(names)

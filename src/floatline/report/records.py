"""What one line of a run directory's files says, as frozen records.

A number that is missing, null or not a number is NaN, so that every consumer has one case to handle instead of three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAN = math.nan


def as_number(value: object) -> float:
    """Return `value` as a float, NaN for anything that is no number (None, text, true).

    >>> as_number(3), as_number(None), as_number(True)
    (3.0, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NAN
    try:
        return float(value)
    except OverflowError:
        return NAN


def as_text(value: object) -> str:
    """Return `value` as text, empty for None."""
    return "" if value is None else str(value)


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return `value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def as_list(value: object) -> list[Any]:
    """Return `value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer update, made or skipped. Times in seconds, memory in bytes."""

    step: int
    loss: float = NAN
    grad_norm: float = NAN
    lr: float = NAN
    loss_scale: float = NAN
    applied: bool = True
    tokens: float = NAN
    step_s: float = NAN
    tokens_per_s: float = NAN
    memory_bytes: float = NAN

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Step:
        numbers = {name: as_number(line.get(name)) for name in _STEP_NUMBERS}
        return cls(step=int(line["step"]), applied=line.get("applied") is not False, **numbers)


_STEP_NUMBERS = ("loss", "grad_norm", "lr", "loss_scale", "tokens", "step_s", "tokens_per_s", "memory_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """Right answers among all answers."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / self.total if self.total else NAN


@dataclass(frozen=True, kw_only=True, slots=True)
class Eval:
    """One evaluation of one split; `groups` tallies the answers by kind of question."""

    step: int
    split: str
    loss: float
    accuracy: float
    groups: dict[str, Tally]
    samples: float
    seconds: float

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Eval:
        groups = {}
        for kind, tally in as_mapping(line.get("groups")).items():
            correct, total = (as_number(as_mapping(tally).get(key)) for key in ("correct", "total"))
            if math.isfinite(correct) and math.isfinite(total):
                groups[str(kind)] = Tally(correct=int(correct), total=int(total))
        numbers = {name: as_number(line.get(name)) for name in ("loss", "accuracy", "samples", "seconds")}
        return cls(step=int(line["step"]), split=as_text(line.get("split")) or "validation", groups=groups, **numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One update that the guard refused: `what` is "loss", "gradient", "buffer" or "overflow".

    `action` is "skip", "leave out" (one micro-batch of it) or "rollback" (to update `to`).
    """

    step: int
    what: str
    action: str
    reason: str
    to: float = NAN

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Fault:
        texts = {key: as_text(line.get(key)) for key in ("what", "action", "reason")}
        return cls(step=int(line["step"]), to=as_number(line.get("to")), **texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cure:
    """What a run changed so that a fault does not come again, and the diagnosis that it rests on."""

    step: int
    what: str
    key: str
    value: str
    reason: str
    finding: str

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Cure:
        texts = {key: as_text(line.get(key)) for key in ("what", "key", "value", "reason", "finding")}
        return cls(step=int(line["step"]), **texts)

    @property
    def done(self) -> str:
        """What was changed, in a few words."""
        return f"{self.key} = {self.value}" if self.key else "the batch is left out"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Trouble that no NaN showed."""

    step: int
    what: str
    text: str
    remedy: str

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Alarm:
        return cls(step=int(line["step"]), **{key: as_text(line.get(key)) for key in ("what", "text", "remedy")})


@dataclass(frozen=True, kw_only=True, slots=True)
class Headroom:
    """Bits to overflow of the modules that had the least of them, in one step."""

    step: int
    bits: dict[str, float]

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Headroom:
        known = {str(name): as_number(bits) for name, bits in as_mapping(line.get("bits")).items()}
        return cls(step=int(line["step"]), bits={name: bits for name, bits in known.items() if math.isfinite(bits)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One question that the model answered; `correct` is None where nobody judged it."""

    images: tuple[str, ...]
    question: str
    answer: str
    truth: str
    correct: bool | None
    kind: str

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Sample:
        correct = line.get("correct")
        return cls(
            images=tuple(str(path) for path in as_list(line.get("images"))),
            correct=correct if isinstance(correct, bool) else None,
            **{key: as_text(line.get(key)) for key in ("question", "answer", "truth", "kind")},
        )

"""What the guard decided about one update, and why: the words that metrics, screen and report use."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class What(Enum):
    """What was not finite."""

    LOSS = "loss"
    GRADIENT = "gradient"
    BUFFER = "buffer"
    OVERFLOW = "overflow"


@dataclass(frozen=True)
class Skip:
    """One update that was not made, or was made without some of its micro-batches.

    Args:
        step: Index of the update, the first is 1.
        what: LOSS, GRADIENT and BUFFER are faults, OVERFLOW is routine under loss scaling.
        loss: The loss as it was, NaN and inf included.
        grad_norm: The gradient norm as it was; NaN where no gradient was computed.
        parameters: Those whose gradient was not finite, by name; empty where no gradient was at fault.
        micro_batches: Indices of micro-batches that were left out because their loss was not finite.
        made: The update was made from the other micro-batches.
        rolled_back_to: The update that a rollback went back to, None without one.
    """

    step: int
    what: What
    loss: float
    grad_norm: float
    parameters: tuple[str, ...] = ()
    micro_batches: tuple[int, ...] = ()
    made: bool = False
    rolled_back_to: int | None = None

    @property
    def fault(self) -> bool:
        return self.what is not What.OVERFLOW

    @property
    def reason(self) -> str:
        """The reason as a sentence."""
        if self.made:
            which = ", ".join(map(str, self.micro_batches))
            return f"micro-batch {which} was left out of update {self.step}: its loss was {self.loss}"
        if self.what is What.LOSS:
            return f"the loss was {self.loss} at update {self.step}"
        if self.what is What.BUFFER:
            return f"a buffer became non-finite at update {self.step} (loss {self.loss:.4g}); it was put back"
        if self.what is What.GRADIENT:
            return f"the gradient norm was {self.grad_norm} at update {self.step} (loss {self.loss:.4g}){self._whose}"
        return f"scaled fp16 gradients overflowed at update {self.step}; the loss scale was halved"

    @property
    def _whose(self) -> str:
        if not self.parameters:
            return ""
        more = f" and {len(self.parameters) - 1} more" if len(self.parameters) > 1 else ""
        return f": {self.parameters[0]}{more}"


@dataclass(frozen=True)
class Alarm:
    """Trouble that no NaN shows.

    Args:
        step: Index of the update at which it was seen.
        name: Short, of the table in silent.py.
        text: What was measured.
        remedy: What to do about it.
    """

    step: int
    name: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} at update {self.step}: {self.text}; {self.remedy}"

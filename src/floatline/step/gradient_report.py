"""What one look at the gradients found, as an object that is true when there is nothing to say.

`if not report` asks whether anything is worth reading; `report.finite` whether the update may be made. They differ for
large norms, which clipping is there for, and for gradients that are all zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from floatline.errors import NonFiniteError

LARGE = 10
"""Times the clip norm from which on a norm is worth a warning."""
_LISTED = 5


@dataclass(frozen=True)
class BadGradient:
    """A parameter whose gradient is not finite.

    Attributes:
        name: Dotted name.
        nan: NaN elements, over all ranks; None where the gradient was gone before the host knew (`lag=True`).
        inf: Infinite elements, likewise. Both 0: finite values so large that their norm overflows fp32.
        elements: Elements in all.
        norm: The 2-norm as it was: NaN or inf.
    """

    name: str
    nan: int | None
    inf: int | None
    elements: int
    norm: float

    def __str__(self) -> str:
        if self.nan is None or self.inf is None:
            return f"{self.name}: {'NaN' if math.isnan(self.norm) else 'Inf'}"
        counts = [f"{count} {what}" for count, what in ((self.nan, "NaN"), (self.inf, "Inf")) if count]
        found = " and ".join(counts) or "values so large that their norm overflows; none NaN or Inf"
        return f"{self.name}: {found} of {self.elements} elements" if counts else f"{self.name}: {found}"


@dataclass(frozen=True)
class GradientReport:
    """The gradients of one update; true when there is nothing to say of them.

    Attributes:
        step: The update, the first is 1; 0 when none has been read yet (`lag=True`).
        norm: Total 2-norm, unscaled; NaN or inf as it was, NaN without any gradient.
        largest: Largest magnitude of an element, likewise; None where elements were not looked at.
        mean: Mean magnitude, likewise.
        bad: Parameters whose gradient is not finite.
        missing: Trainable parameters without a gradient. Only when all are is that a problem.
        parameters: How many have a gradient.
        max_grad_norm: The clip norm, None without.
        scaled: Whether gradients were scaled by a loss scale, so that an overflow is routine.
    """

    step: int
    norm: float
    largest: float | None = None
    mean: float | None = None
    bad: tuple[BadGradient, ...] = ()
    missing: tuple[str, ...] = ()
    parameters: int = 0
    max_grad_norm: float | None = None
    scaled: bool = False

    @property
    def finite(self) -> bool:
        """Whether every gradient is finite and there is one: the update may be made."""
        return (not self.bad and self.parameters > 0) or self.step == 0

    @property
    def all_zero(self) -> bool:
        return self.parameters > 0 and self.norm == 0.0

    @property
    def large(self) -> bool:
        """Whether the norm is finite and above ten times the clip norm."""
        return self.max_grad_norm is not None and LARGE * self.max_grad_norm < self.norm < math.inf

    @property
    def ok(self) -> bool:
        return self.finite and not self.all_zero and not self.large

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_bad(self) -> None:
        """Raise where the update must not be made.

        Raises:
            NonFiniteError: A gradient is NaN or Inf, or no parameter has one.
        """
        if not self.finite:
            raise NonFiniteError(str(self), hint=self.hint)

    @property
    def hint(self) -> str:
        """What to do next, one sentence; empty when all is well."""
        if self.step and not self.parameters:
            return "call check() after backward() and before zero_grad(), and see that the loss depends on the model"
        if self.bad and self.scaled:
            return "under loss scaling this is routine now and then: skip the update and let GradScaler halve the scale"
        if self.bad:
            return "leave this update out (optimizer.zero_grad()) and keep the batch: clipping would spread the NaN"
        if self.all_zero:
            return "a detached loss, a mask over everything or fp16 gradients that vanish without loss scaling do this"
        if self.large:
            return "clipping handles one; if they go on, lower the learning rate or warm up longer"
        return ""

    def __str__(self) -> str:
        if not self.step:
            return "no update has been read yet"
        if not self.parameters:
            return f"update {self.step}: no parameter has a gradient"
        if self.bad:
            listed = "; ".join(str(one) for one in self.bad[:_LISTED])
            more = f"; and {len(self.bad) - _LISTED} more" if len(self.bad) > _LISTED else ""
            count = f"{len(self.bad)} of {self.parameters} gradients {'is' if len(self.bad) == 1 else 'are'} not finite"
            return f"update {self.step}: {count}: {listed}{more}"
        if self.all_zero:
            return f"update {self.step}: all {self.parameters} gradients are zero"
        text = f"update {self.step}: norm {self.norm:.4g}"
        if self.largest is not None and self.mean is not None:
            text += f", largest {self.largest:.4g}, mean {self.mean:.4g}"
        if self.large and self.max_grad_norm is not None:
            text += f"; that is ×{self.norm / self.max_grad_norm:.0f} of the clip norm {self.max_grad_norm:g}"
        return text

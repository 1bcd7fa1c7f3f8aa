"""How much error of the loss and the gradients a policy may have, and how an effect is held against it.

The gradient's error is that of the whole gradient, ||g - g64|| / ||g64||. Stochastic gradients differ from batch to
batch by far more than the default of 10 %; below it the course of training does not tell the formats apart. A single
parameter may be further off (50 %): a small tensor does not show in the norm of all.

Source: torch's own accuracy check for compiled half-precision code allows RMSE(res, fp64) up to 3 times that of the
reference; the tolerance here is absolute, because here there is no reference in the same format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from floatline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Largest errors that are allowed, all relative.

    Args:
        loss: Of the loss (or of the outputs, where there is no loss).
        gradient: Of the whole gradient.
        tensor: Of any one parameter's gradient.

    Raises:
        ConfigError: Not a positive number.
    """

    loss: float = 0.02
    gradient: float = 0.1
    tensor: float = 0.5

    def __post_init__(self) -> None:
        for name in ("loss", "gradient", "tensor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"tolerance.{name}={value!r} is no positive number", hint="write e.g. 0.05 for 5 %")

    @classmethod
    def of(cls, value: float | Tolerance | None) -> Tolerance:
        """Return a tolerance for what a user gave: a number is that of the gradient, the others in proportion.

        >>> Tolerance.of(0.05).tensor
        0.25
        """
        if isinstance(value, Tolerance):
            return value
        if value is None:
            return cls()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"tolerance={value!r} is no positive number", hint="write e.g. 0.05 for 5 %")
        share = float(value) / cls.gradient
        return cls(loss=cls.loss * share, gradient=float(value), tensor=cls.tensor * share)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a policy does to one step, against fp64.

    Attributes:
        policy: Its string.
        loss_error: Relative error of the loss or of the outputs; `inf` where it is not finite.
        gradient_error: Relative error of the whole gradient; 0 where no backward was run.
        tensor_error: The largest relative error of one parameter's gradient, of those that count (exact.py).
        tensor: That parameter.
        scale: Loss scale of the backward.
    """

    policy: str
    loss_error: float
    gradient_error: float = 0.0
    tensor_error: float = 0.0
    tensor: str = ""
    scale: float = 1.0

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss_error, self.gradient_error, self.tensor_error)))

    def ratio(self, tolerance: Tolerance) -> float:
        """Return the worst error in units of what is allowed: above 1 the policy is not safe."""
        if not self.finite:
            return math.inf
        return max(
            self.loss_error / tolerance.loss,
            self.gradient_error / tolerance.gradient,
            self.tensor_error / tolerance.tensor,
        )

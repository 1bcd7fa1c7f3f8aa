"""Mixed precision as a technique, so that plans, benchmarks and ladders treat it like the others.

The policies, their rules and loss scaling live in `floatline/precision`; `TrainStep` reads the policy off this object
and gives it its place among the stages. Applied on its own it casts weights and makes islands, and its context is the
policy's autocast; loss scaling and master weights need the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict
from floatline.precision import Policy, apply_precision
from floatline.precision import resolve as resolve_precision
from floatline.techniques.base import Applied, Stage, Technique


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Technique):
    """Train in a given precision.

    Args:
        policy: As in `TrainStep(precision=...)`: "bf16-mixed", "16-mixed; lm_head=32", "auto" ...
    """

    name = "precision"
    stage = Stage.PRECISION

    policy: str = "auto"

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        choice = resolve_precision(self.policy, hardware)  # raises with the reason where it is illegal
        return Verdict(True, choice.reason)

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        choice = resolve_precision(self.policy, hardware)
        applied = apply_precision(model, choice.policy, hardware)
        return Applied(
            technique=self,
            touched=("", *applied.touched),
            undo=applied.undo,
            notes=(f"{choice.policy}: {choice.reason}", *applied.notes),
            around=applied.autocast,
        )


def asked_precision(precision: str | Policy, technique: Technique | None) -> str | Policy:
    """Return the precision asked for: of the step, or of its precision technique.

    Raises:
        ConfigError: Both are given, and differ.
    """
    if not isinstance(technique, MixedPrecision):
        return precision
    if str(precision) not in ("auto", technique.policy):
        raise ConfigError(f"precision is {precision} and {technique}", hint="give one of them")
    return technique.policy

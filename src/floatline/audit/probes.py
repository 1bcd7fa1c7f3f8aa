"""What lowering a single module does to the loss and the gradients, everything else in fp32.

The local error of an op says what it loses; this says what that means for the step. One module costs one step, so the
most suspected ones are run, up to a number; the rest of a healthy model loses no more than those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from floatline.audit.candidate import NAMES
from floatline.audit.modules import parents_first
from floatline.audit.subject import Exact, Subject
from floatline.audit.tolerance import Effect
from floatline.audit.trials import Item
from floatline.errors import PrecisionError
from floatline.precision import Policy


def probe(
    subject: Subject, exact: Exact, name: str, mode: str, items: Sequence[Item], most: int | None, scale: float
) -> Mapping[str, Effect]:
    """Lower one module at a time.

    Args:
        subject: What is audited.
        exact: The step in fp64.
        name: "bf16" or "fp16".
        mode: "mixed" or "true".
        items: The candidates.
        most: Modules to run; None for all.
        scale: Loss scale.

    Returns:
        Module -> effect, the most suspected first.
    """
    ranked = sorted(items, key=lambda item: -item.suspicion)[:most]
    found: dict[str, Effect] = {}
    for item in ranked:
        policy = _alone(item.name, name, mode, items)
        try:
            found[item.name] = subject.effect(policy, exact, what="probes", scale=scale)
        except PrecisionError:  # shares a weight with a module of the other format
            continue
    return found


def _alone(module: str, name: str, mode: str, items: Sequence[Item]) -> Policy:
    """Return the policy in which all candidates but one are islands; code outside of them stays lowered."""
    others = parents_first([item.name for item in items if not _related(item.name, module)])
    return Policy.parse("; ".join([NAMES[name][mode == "true"], *(f"{other}=32" for other in others)]))


def _related(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")

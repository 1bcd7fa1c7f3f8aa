"""What lowering a single module does to the loss and the gradients, everything else in fp32.

The local error of an op says what it loses; this says what that means for the step. One module costs one step, so the
most suspected ones are run, up to a number, and no more after `QUIET` in a row that hardly matter.

Where a module's inputs arrive in the half format when everything is lowered, they are rounded here too: a norm or a
softmax by hand computes in the format that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from floatline.audit.exact import Exact
from floatline.audit.lowered import Lowered
from floatline.audit.metered import inputs_rounded
from floatline.audit.modules import candidates
from floatline.audit.patterns import literal
from floatline.audit.subject import Subject
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.trials import Item, inside, merged
from floatline.errors import PrecisionError
from floatline.observe.finite import plain_name
from floatline.precision import Policy
from floatline.precision.islands import DTYPES

QUIET = 4
HARDLY = 0.1
"""Error in units of the tolerance below which a module by itself hardly matters."""


def probe(subject: Subject, exact: Exact, low: Lowered, most: int | None, tolerance: Tolerance) -> Mapping[str, Effect]:
    """Lower one module at a time.

    Args:
        subject: What is audited.
        exact: The step in fp64.
        low: The audit of the format. Modules that raise in it stay in fp32.
        most: Modules to run at most; None for all.
        tolerance: What is allowed.

    Returns:
        Module -> effect, the most suspected first.
    """
    items = candidates(subject.model, low.judged, frozenset())
    able = [item for item in items if not inside(item.name, low.raising)]
    ranked = sorted(able, key=lambda item: -item.suspicion)[:most]
    found: dict[str, Effect] = {}
    quiet = 0
    for item in ranked:
        if most is not None and quiet == QUIET:
            break
        half = item.name in low.borders.half_inputs
        around = partial(_rounded, subject, item.name, low.name) if half else nullcontext
        policy, scale = _alone(item.name, low, items), low.all_lowered.scale
        try:
            found[item.name] = subject.effect(policy, exact, what="probes", scale=scale, around=around)
        except PrecisionError:  # shares a weight with a module of the other format
            continue
        quiet = quiet + 1 if found[item.name].ratio(tolerance) < HARDLY else 0
    return found


def _rounded(subject: Subject, module: str, name: str) -> AbstractContextManager[None]:
    found = next(m for n, m in subject.model.named_modules() if plain_name(n) == module)
    return inputs_rounded(found, DTYPES[name])


def _alone(module: str, low: Lowered, items: Sequence[Item]) -> Policy:
    """Return the policy in which all candidates but one are islands; code outside of them stays lowered."""
    others = sorted(merged({*low.raising, *(item.name for item in items if not _related(item.name, module))}))
    return Policy.parse("; ".join([low.base, *(f"{literal(other)}=32" for other in others)]))


def _related(one: str, other: str) -> bool:
    return inside(one, {other}) or inside(other, {one})

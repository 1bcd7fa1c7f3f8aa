"""`train.optimizer`: one word for what becomes of small updates, and the technique that it stands for.

    adamw                 AdamW; over the weights of `bf16-true` with an fp32 master copy (master_weights)
    adamw-plain           AdamW on the weights as they are: in pure bf16 updates below half an ulp are rounded away
    kahan                 what rounding cuts off a bf16 weight is kept (kahan)
    stochastic-rounding   bf16 weights are rounded at random (stochastic_rounding)
    low-bit               the moments in 8 bits, bf16 weights rounded at random (low_bit_optimizer)

The word is turned into a technique when the recipe is read, so plans, runs and exports see the same; its settings are
the technique's: `train.optimizer=kahan techniques.kahan.library=optimi` takes torch-optimi's optimizer,
`train.optimizer=stochastic-rounding techniques.stochastic_rounding.library=torchao` torchao's.

A recipe that names such a technique by itself need not say the word. Where neither is said, AdamW steps the weights as
they are; the reason says what that means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from floatline.errors import ConfigError
from floatline.techniques import make_technique
from floatline.train.techniques import write_techniques

Choice = Literal["adamw", "adamw-plain", "kahan", "stochastic-rounding", "low-bit"]

TECHNIQUES: dict[str, str] = {
    "kahan": "kahan",
    "stochastic-rounding": "stochastic_rounding",
    "low-bit": "low_bit_optimizer",
}
"""Choice -> technique, whatever the precision."""
RIVALS = (*TECHNIQUES.values(), "master_weights")
"""Techniques that settle how the optimizer keeps small updates or its state; one of them at most."""


def is_pure_bf16(precision: str) -> bool:
    """Say whether a policy trains bf16 weights; `auto` never does."""
    return precision.split(";")[0].strip() == "bf16-true"


def technique_of(choice: str, precision: str) -> tuple[str, dict[str, Any]] | None:
    """Return the technique that a choice stands for under a precision, with its settings; None for no technique."""
    if choice == "adamw":
        return ("master_weights", {}) if is_pure_bf16(precision) else None
    if choice not in TECHNIQUES:
        return None
    rounds = choice == "low-bit" and is_pure_bf16(precision)
    return TECHNIQUES[choice], {"stochastic_rounding": True} if rounds else {}


def optimizer_tree(tree: dict[str, Any], asked: Any) -> dict[str, Any]:
    """Return a recipe's tree with the technique that its `train.optimizer` stands for.

    Args:
        tree: Its techniques are spelled out.
        asked: The techniques as the user wrote them, for a contradiction that spelling out loses.

    Raises:
        ConfigError: Another technique of the kind is there, or the choice's own was switched off.
    """
    choice, precision = _said(tree)
    if choice is None:
        return tree
    found = technique_of(choice, precision)
    name = found[0] if found else ""
    techniques = tree["techniques"]
    rival = next((n for n in RIVALS if techniques.get(n) and n != name), None)
    if rival:
        raise ConfigError(
            f"train.optimizer={choice} and techniques.{rival} are two optimizers",
            hint=f"set techniques.{rival}=null, or leave train.optimizer open",
        )
    if not found:
        return tree
    if isinstance(asked, Mapping) and name in asked and asked[name] in (None, False):
        raise ConfigError(
            f"train.optimizer={choice} is the technique {name}, which techniques.{name} switches off",
            hint="take another train.optimizer, or null",
        )
    if name in techniques:
        return tree
    return {**tree, "techniques": {**techniques, **write_techniques([make_technique(*found)])}}


def _said(tree: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the choice and the precision of a tree that nobody has checked yet; what is no choice is told later."""
    train, precision = tree.get("train"), tree.get("precision", "auto")
    choice = train.get("optimizer") if isinstance(train, Mapping) else None
    known = isinstance(choice, str) and isinstance(precision, str)
    return (choice, precision) if known else (None, "auto")


def ruled_out(choice: str | None, precision: str) -> tuple[str, ...]:
    """Return the techniques that a plan must not add, because the optimizer is settled."""
    if choice is None:
        return ()
    found = technique_of(choice, precision)
    return tuple(name for name in RIVALS if not found or name != found[0])


def choose_optimizer(techniques: Mapping[str, Any], precision: str) -> tuple[str, str]:
    """Return what an open `train.optimizer` is, and why."""
    present = next((name for name in RIVALS if techniques.get(name)), None)
    if present is not None:
        choices = {technique: choice for choice, technique in TECHNIQUES.items()}
        return choices.get(present, "adamw"), f"techniques.{present} is set"
    if is_pure_bf16(precision):
        return "adamw-plain", (
            "nothing was asked for: updates below half an ulp of a bf16 weight are rounded away; adamw (fp32 master "
            "weights), kahan and stochastic-rounding keep them"
        )
    return "adamw", "the optimizer steps fp32 weights, so that no small update is lost"

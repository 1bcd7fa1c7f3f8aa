"""A plan as settings: a recipe for `floatline train`, and what other programs take.

`trainer_arguments`, `accelerate_config` and `fsdp_config` hold only keys that those programs know. What they have no
key for is in `not_expressible`, with what to do instead.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from floatline.plan.export_accelerate import accelerate_config, accelerate_gaps, fsdp_config
from floatline.plan.export_trainer import trainer_arguments, trainer_gaps
from floatline.techniques import make_technique

if TYPE_CHECKING:
    from floatline.plan.plan import Plan

__all__ = ["accelerate_config", "fsdp_config", "not_expressible", "recipe_of", "trainer_arguments"]


def recipe_of(plan: Plan) -> dict[str, Any]:
    """Return the part of a recipe that a plan decides: `precision`, `techniques`, and clipping."""
    techniques: dict[str, Any] = {}
    for text in plan.techniques:
        technique = make_technique(text)
        settings = {f.name: getattr(technique, f.name) for f in fields(technique)}
        changed = {name: value for name, value in settings.items() if value != _default(technique, name)}
        techniques[technique.name] = {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()} or True
    return {"precision": plan.precision, "techniques": techniques, "train": {"max_grad_norm": plan.max_grad_norm}}


def _default(technique: Any, name: str) -> Any:
    return next(field.default for field in fields(technique) if field.name == name)


def not_expressible(plan: Plan) -> dict[str, dict[str, str]]:
    """Return what other programs' settings cannot say of a plan: program -> what -> what to do instead."""
    return {"trainer": trainer_gaps(plan), "accelerate": accelerate_gaps(plan)}

"""A plan as settings: a recipe for `floatline train`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from floatline.techniques import make_technique

if TYPE_CHECKING:
    from floatline.plan.plan import Plan


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

"""What a run has changed about itself to stay finite, in its resolved recipe and in its checkpoints.

A cure is written into the recipe at once, for a person to read and to run again. A run that is killed before its next
checkpoint goes on from an older one, which was made without the cure: there the recipe is put back to what that
checkpoint was made with, the fault comes again and is healed again. So a run that was killed is bit for bit the run
that was not.

A checkpoint keeps how many changes were made before it; run.json keeps them all, with what was there before each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from floatline.precision import Policy
from floatline.train.checkpoint import load_state
from floatline.train.manifest import Manifest
from floatline.train.recipe import parse_recipe
from floatline.train.resolve import AutomaticChoice, Resolved, recipe_text
from floatline.train.rundir import RunDirectory


def change_recipe(
    resolved: Resolved, rundir: RunDirectory, manifest: Manifest, key: str, value: Any, reason: str
) -> None:
    """Write what a run has changed while it trained into its resolved recipe, so that it goes on and runs again so.

    Args:
        resolved: Changed in place.
        rundir: recipe.yaml is replaced.
        manifest: Its resolved recipe and choices, which a resume reads, and `healed`, all changes so far.
        key: Dotted.
        value: What it is from now on.
        reason: Why.
    """
    chosen = next((choice for choice in resolved.choices_as_dicts() if choice["key"] == key), None)
    before = _set(resolved, key, value)
    resolved.choices.append(AutomaticChoice(key, value, reason))
    change = {"key": key, "value": value, "reason": reason, "before": before, "chosen": chosen}
    manifest.values["healed"] = [*manifest.values.get("healed", []), change]
    _write(resolved, rundir, manifest)


def as_of(
    checkpoint: Path | None, resolved: Resolved, rundir: RunDirectory, manifest: Manifest, say: Callable[[str], None]
) -> Resolved:
    """Return the recipe as a checkpoint was made with it: what was changed after it has yet to happen.

    Args:
        checkpoint: None for the start of a run.
        resolved: Changed in place.
        rundir: recipe.yaml is replaced where something is put back.
        manifest: As for `change_recipe`.
        say: Told of each change that is put back.
    """
    healed = manifest.values.get("healed", [])
    if not healed:
        return resolved
    findings = load_state(checkpoint).get("findings", {}) if checkpoint else {"changes": 0}
    for change in reversed(healed[findings.get("changes", len(healed)) :]):
        healed.remove(change)
        if checkpoint is None:  # the recipe was resolved anew
            continue
        _set(resolved, change["key"], change["before"])
        resolved.choices += [AutomaticChoice(**change["chosen"])] if change["chosen"] else []
        say(f"{change['key']} = {change['before']}  (as at the checkpoint; {change['value']} came after it)")
    _write(resolved, rundir, manifest)
    return resolved


def _set(resolved: Resolved, key: str, value: Any) -> Any:
    """Give a key of the recipe a value, without a reason; returns what it was."""
    tree = resolved.recipe.model_dump(mode="json")
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    before, inner[name] = inner[name], value
    resolved.recipe = parse_recipe(tree)
    resolved.policy = Policy.parse(resolved.recipe.precision)
    resolved.choices = [choice for choice in resolved.choices if choice.key != key]
    return before


def _write(resolved: Resolved, rundir: RunDirectory, manifest: Manifest) -> None:
    tree = resolved.recipe.model_dump(mode="json")
    manifest.update(resolved=tree, choices=resolved.choices_as_dicts())
    rundir.write_text("recipe.yaml", recipe_text(resolved))

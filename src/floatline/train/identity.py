"""Whose run directory is this? One with checkpoints belongs to the recipe and the data that made them.

So "resumed" always means the same run: another learning rate, or training data that changed, is refused.
"""

from __future__ import annotations

from typing import Any

from floatline.errors import RunDirectoryError
from floatline.train.checkpoint import list_checkpoints
from floatline.train.manifest import Manifest


def has_checkpoints(manifest: Manifest) -> bool:
    """Say whether there is something to resume from."""
    return bool(list_checkpoints(manifest.rundir.checkpoints))


def is_same_recipe(manifest: Manifest, recipe: dict[str, Any]) -> bool:
    """Say whether `recipe` is what the run was started with, as it was written or as it was resolved."""
    return recipe in (manifest.values.get("asked"), manifest.values.get("resolved"))


def refuse_other_recipe(manifest: Manifest, recipe: dict[str, Any]) -> None:
    """Raise unless the directory is free for `recipe` or already this recipe's.

    Raises:
        RunDirectoryError: Names the first key that differs.
    """
    before = manifest.values.get("asked")
    if not has_checkpoints(manifest) or not before or is_same_recipe(manifest, recipe):
        return
    key, old, new = _first_difference(before, recipe)
    raise RunDirectoryError(
        f"{manifest.rundir.path} holds a run of another recipe: {key} was {old!r}, now {new!r}",
        hint="choose another run.dir, or go back to the recipe that this run was started with",
    )


def refuse_changed_data(manifest: Manifest, facts: dict[str, Any]) -> None:
    """Raise if the training data are not those that the checkpoints were made with.

    Args:
        facts: Split -> {"path", "sha256", ...} as of now.

    Raises:
        RunDirectoryError: The file has changed.
    """
    before = manifest.values.get("data", {}).get("train")
    if has_checkpoints(manifest) and before and before["sha256"] != facts["train"]["sha256"]:
        raise RunDirectoryError(
            f"{facts['train']['path']} has changed since this run began, so it cannot be resumed exactly",
            hint="choose another run.dir to train on the changed data",
        )


def _first_difference(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, Any, Any]:
    flat_before, flat_after = flatten(before), flatten(after)
    for key in {**flat_before, **flat_after}:
        if flat_before.get(key) != flat_after.get(key):
            return key, flat_before.get(key), flat_after.get(key)
    return "recipe", None, None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict with dotted keys.

    >>> flatten({"train": {"lr": 0.1}, "precision": "auto"})
    {'train.lr': 0.1, 'precision': 'auto'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

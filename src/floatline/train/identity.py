"""Whose run directory is this? One with checkpoints belongs to the recipe and the data that made them.

So "resumed" always means the same run: another learning rate, or training data that changed, is refused. So is another
base model under adapters, for their checkpoints do not hold it. Settings that
do not change what is learnt (where it runs, how often it saves, how patient its guard is) may change on resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from floatline.errors import RunDirectoryError
from floatline.train.checkpoint import list_checkpoints
from floatline.train.manifest import Manifest
from floatline.train.techniques import FREE_TECHNIQUES, with_free_techniques

FREE_KEYS = (
    "run.",
    "guard.",
    "data.num_workers",
    "data.cache_bytes",
    "train.micro_batch_size",
    "train.checkpoint_every",
    "train.keep_last",
    "eval.every",
    "eval.batch_size",
    *(f"techniques.{name}." for name in sorted(FREE_TECHNIQUES)),
)


def has_checkpoints(manifest: Manifest) -> bool:
    """Say whether there is something to resume from."""
    return bool(list_checkpoints(manifest.rundir.checkpoints))


def is_same_recipe(manifest: Manifest, recipe: dict[str, Any]) -> bool:
    """Say whether `recipe` is what the run was started with, as it was written or as it was resolved."""
    known = (manifest.values.get("asked"), manifest.values.get("resolved"))
    return any(tree and not _differences(tree, recipe) for tree in known)


def refuse_other_recipe(manifest: Manifest, recipe: dict[str, Any]) -> None:
    """Raise unless the directory is free for `recipe` or already this recipe's.

    Raises:
        RunDirectoryError: Names the first key that differs, or that nobody knows whose checkpoints these are.
    """
    path, before = manifest.rundir.path, manifest.values.get("asked")
    if not has_checkpoints(manifest) and manifest.values.get("status") != "finished":
        return
    if not before:
        raise RunDirectoryError(
            f"{path} has checkpoints, but its run.json is missing or damaged, so nobody knows whose they are",
            hint="restore run.json, or choose another run.dir",
        )
    if not is_same_recipe(manifest, recipe):
        key, old, new = _differences(before, recipe)[0]
        raise RunDirectoryError(
            f"{path} holds a run of another recipe: {key} was {old!r}, now {new!r}",
            hint="choose another run.dir, or go back to the recipe that this run was started with",
        )


def with_free_keys(stored: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Return the stored resolved recipe with the free settings that the user gives now.

    With `memory: auto` the techniques of the first start's plan stay as well, unless others of their name are given.
    """
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in stored.items()}
    before, now = stored.get("techniques", {}), asked.get("techniques", {})
    techniques = with_free_techniques(before, {**before, **now} if asked.get("memory") else now)
    for key, value in flatten(asked).items():
        if _is_free(key) and value is not None and not key.startswith("techniques."):
            section, name = key.split(".")
            merged[section][name] = value
    return {**merged, "techniques": techniques}


def fingerprint(path: str, images: Iterable[Path]) -> str:
    """Return a SHA-256 over a JSONL file and over name and size of every image it shows."""
    digest = hashlib.sha256(Path(path).read_bytes())
    for image in sorted(set(images)):
        digest.update(f"{image.name} {image.stat().st_size}\n".encode())
    return digest.hexdigest()


def refuse_changed_data(manifest: Manifest, facts: dict[str, Any]) -> None:
    """Raise if the data are not those that the checkpoints were made with.

    Args:
        facts: Split -> {"path", "sha256", ...} as of now.

    Raises:
        RunDirectoryError: A file or an image has changed.
    """
    if not has_checkpoints(manifest):
        return
    for split, before in manifest.values.get("data", {}).items():
        now = facts.get(split)
        if now and before["sha256"] != now["sha256"]:
            raise RunDirectoryError(
                f"{now['path']} or an image it shows has changed since this run began; it cannot be resumed exactly",
                hint="choose another run.dir to train on the changed data",
            )


def fingerprint_base(files: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each of a model's files, by name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def note_base(manifest: Manifest, path: str, files: Iterable[Path]) -> None:
    """Note which model adapters are trained on; refuse another than the checkpoints were made with.

    Args:
        path: The model as the recipe names it.
        files: What it was loaded from.

    Raises:
        RunDirectoryError: A file has changed, is gone or is new.
    """
    before, now = manifest.values.get("base"), fingerprint_base(files)
    if before and has_checkpoints(manifest) and before["sha256"] != now:
        name = next(n for n in {**before["sha256"], **now} if before["sha256"].get(n) != now.get(n))
        raise RunDirectoryError(
            f"the base model {path} has changed since this run began ({name}); its adapters belong to the old one",
            hint="put the old files back (their SHA-256 are in run.json under base), or choose another run.dir",
        )
    manifest.update(base={"path": path, "sha256": now})


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    old, new = flatten(before), flatten(after)
    keys = [key for key in {**old, **new} if not _is_free(key) and old.get(key) != new.get(key)]
    return [(key, old.get(key), new.get(key)) for key in keys]


def _is_free(key: str) -> bool:
    return any(key == free.rstrip(".") or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict with dotted keys.

    >>> flatten({"train": {"lr": 0.1}, "precision": "auto"})
    {'train.lr': 0.1, 'precision': 'auto'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

"""Run the condemned steps of a run again: `floatline diagnose RUN`, or one of them: RUN/findings/update-00000051.

The model is built as the run built it, from its resolved recipe; weights and buffers are the bundle's, or of the
checkpoint that it names. A bundle that was carried elsewhere finds its recipe two directories up, or by `--recipe`.

Not covered: runs that sharded the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from floatline.diagnose.bundle import FILE, Bundle, load_bundle, put_into, write_finding
from floatline.diagnose.replay import Replay, replay
from floatline.errors import BundleError
from floatline.precision import Policy
from floatline.train.recipe import Recipe, load_recipe
from floatline.train.resolve import resolve_recipe
from floatline.train.setup import load_start, make_step


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One bundle and what came of it."""

    path: Path
    replay: Replay

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"bundle": str(self.path), **self.replay.as_dict()}


def replay_findings(path: Path, recipe: Path | None = None) -> list[Replayed]:
    """Replay one bundle, or all bundles of a run; what is found is written beside each.

    Args:
        path: A run directory, a directory below its findings/, or the file in it.
        recipe: The resolved recipe, where it does not lie beside the bundle.

    Raises:
        BundleError: There is no bundle, or it cannot be read or put on the model.
        ConfigError: The recipe cannot be read.
        ModelError: The model that it names is not there.
    """
    bundles = _bundles(path)
    source = recipe or _recipe_beside(bundles[0])
    loaded = load_recipe(source)
    found = []
    for each in bundles:
        bundle = load_bundle(each)
        replayed = _replay(bundle, loaded, source.parent)
        if replayed.finding is not None:
            write_finding(each, replayed.finding.as_dict())
        found.append(Replayed(path=each, replay=replayed))
    return found


def _bundles(path: Path) -> list[Path]:
    if path.name == FILE:
        path = path.parent
    if (path / FILE).exists():
        return [path]
    found = sorted(each.parent for each in (path / "findings").glob(f"update-*/{FILE}"))
    if not found:
        what = (
            "holds no findings: no update of it was condemned"
            if (path / "run.json").exists()
            else "is no run or bundle"
        )
        raise BundleError(f"{path} {what}", hint="pass a run directory, or one below its findings/")
    return found


def _recipe_beside(bundle: Path) -> Path:
    recipe = bundle.parent.parent / "recipe.yaml"
    if not recipe.exists():
        raise BundleError(f"{bundle} has no recipe two directories up", hint="name it: --recipe RUN/recipe.yaml")
    return recipe


def _replay(bundle: Bundle, recipe: Recipe, home: Path) -> Replay:
    """Build the step as the run had it when the update was condemned, and replay."""
    recipe = recipe.model_copy(update={"precision": bundle.precision})
    resolved = resolve_recipe(recipe, train_samples=max(1, recipe.train.batch_size))
    torch.manual_seed(recipe.train.seed)  # what techniques draw (adapters), before the weights are put in
    checkpoint = home / bundle.checkpoint if bundle.weights is None and bundle.checkpoint else None
    model = load_start(recipe, Policy.parse(bundle.precision), checkpoint)
    model.to(resolved.device).train()
    step = make_step(model, resolved)
    put_into(bundle, model)
    if bundle.loss_scale is not None:
        step.scaling.set(bundle.loss_scale)
    return replay(bundle, step)


__all__ = ["Replayed", "replay_findings"]

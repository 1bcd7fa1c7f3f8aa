"""Run the condemned steps of a run again: `floatline diagnose RUN`, or one of them: RUN/findings/update-00000051.

The model is built as the run built it, from its resolved recipe; weights and buffers are the bundle's, or of the
checkpoint that it names. A bundle that was carried elsewhere finds its recipe two directories up, or by `--recipe`.

Of several bundles one that cannot be read does not cost the answer about the others, and an answer does not depend on a
disk that can be written: what was found is told first and written beside its bundle then.

Not covered: runs that sharded the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from floatline.diagnose.bundle import FILE, Bundle, load_bundle, put_into, write_finding
from floatline.diagnose.replay import Replay, replay
from floatline.errors import BundleError, FloatlineError, MemoryExceededError, ModelError
from floatline.precision import Policy
from floatline.train.recipe import Recipe, load_recipe
from floatline.train.resolve import resolve_recipe
from floatline.train.setup import load_start, make_step


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One bundle and what came of it.

    Attributes:
        path: Its directory.
        replay: None where it could not be read or put on the model.
        error: Why not.
    """

    path: Path
    replay: Replay | None = None
    error: FloatlineError | None = None

    @property
    def exit_code(self) -> int:
        """1 where a fault is found, 2 where nothing could be run, else 0."""
        if self.replay is None or self.replay.outcome == "not run":
            return 2
        return 1 if self.replay.at_fault else 0

    def __str__(self) -> str:
        return f"{self.path}\n{self.replay}" if self.replay is not None else ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        if self.replay is not None:
            return {"bundle": str(self.path), **self.replay.as_dict()}
        assert self.error is not None
        return {"bundle": str(self.path), "outcome": "not run", "error": self.error.message, "hint": self.error.hint}

    def write(self) -> None:
        """Put what was found beside the bundle.

        Raises:
            RunDirectoryError: The disk is full, or not to be written to.
        """
        if self.replay is not None and self.replay.finding is not None:
            write_finding(self.path, self.replay.finding.as_dict())


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The bundles there are.

    Attributes:
        paths: Their directories, oldest first.
        note: What the user should know: the run is still going, or nothing was condemned.
    """

    paths: list[Path]
    note: str = ""


def find_bundles(path: Path) -> Kept:
    """Return the bundles of a run, or the one that `path` is.

    Args:
        path: A run directory, its findings/, a directory below that, or the file in it.

    Raises:
        BundleError: There is nothing, or no bundle although updates of the run were condemned.
    """
    if not path.exists():
        raise BundleError(f"{path} does not exist", hint="pass a run directory, or one below its findings/")
    path = path.parent if path.name == FILE else path
    if (path / FILE).exists():
        return Kept(paths=[path])
    run = path.parent if path.name == "findings" else path
    found = sorted(each.parent for each in (run / "findings").glob(f"update-*/{FILE}"))
    if not found and not (run / "run.json").exists():
        raise BundleError(f"{path} is no run or bundle", hint="pass a run directory, or one below its findings/")
    faults = _faults(run)
    if not found and faults:
        raise BundleError(
            f"{faults} {'update' if faults == 1 else 'updates'} of {run} condemned, and none kept",
            hint="runs on several ranks and on a full disk keep none; run it again on one rank",
        )
    going = f"{run} is still going; " if _is_going(run) else ""
    so_far = " so far" if going else ""
    if not found:
        return Kept(paths=[], note=f"{going}no update of it was condemned{so_far}: there is nothing to diagnose")
    return Kept(paths=found, note=f"{going}these are its findings{so_far}" if going else "")


def replay_findings(path: Path, recipe: Path | None = None) -> Iterator[Replayed]:
    """Replay one bundle, or all bundles of a run, one after the other. Nothing is written: see `Replayed.write`.

    Args:
        path: As for `find_bundles`.
        recipe: The resolved recipe, where it does not lie beside the bundle.

    Raises:
        BundleError: There is no bundle; or there is one, and it cannot be read or put on the model. Of several bundles
            that is told of each.
        ConfigError: The recipe cannot be read.
        ModelError: The model that it names is not there.
    """
    bundles = find_bundles(path).paths
    if not bundles:
        return
    source = recipe or _recipe_beside(bundles[0])
    loaded = load_recipe(source)
    for each in bundles:
        try:
            yield Replayed(path=each, replay=_replay(load_bundle(each), loaded, source))
        except BundleError as error:
            if len(bundles) == 1:
                raise
            yield Replayed(path=each, error=error)


def _faults(run: Path) -> int:
    """Return how many faults a run has logged."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    return sum('"kind": "fault"' in line and '"what": "overflow"' not in line for line in lines)


def _is_going(run: Path) -> bool:
    """Say whether a run's process is there; it is told, not relied on."""
    try:
        running = json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "running"
        os.kill(int((run / ".lock").read_text()), 0)
    except PermissionError:  # another user's
        return running
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(running)


def _recipe_beside(bundle: Path) -> Path:
    recipe = bundle.parent.parent / "recipe.yaml"
    if not recipe.exists():
        raise BundleError(f"{bundle} has no recipe two directories up", hint="name it: --recipe RUN/recipe.yaml")
    return recipe


def _replay(bundle: Bundle, recipe: Recipe, source: Path) -> Replay:
    """Build the step as the run had it when the update was condemned, and replay.

    Args:
        bundle: The condemned step.
        recipe: The run's.
        source: Where it was read from.
    """
    recipe = recipe.model_copy(update={"precision": bundle.precision})
    resolved = resolve_recipe(recipe, train_samples=max(1, recipe.train.batch_size))
    torch.manual_seed(recipe.train.seed)  # what techniques draw (adapters), before the weights are put in
    try:
        model = load_start(recipe, Policy.parse(bundle.precision), _checkpoint_of(bundle, source.parent))
    except ModelError as error:
        raise ModelError(
            f"{error.message} (named by {source})",
            hint="put the model back there, or pass --recipe with a copy of the recipe whose model.path is right",
        ) from error
    try:
        model.to(resolved.device).train()
        step = make_step(model, resolved)
        put_into(bundle, model)
        if bundle.loss_scale is not None:
            step.scaling.set(bundle.loss_scale)
        return replay(bundle, step)
    except torch.OutOfMemoryError as error:
        raise MemoryExceededError(
            f"update {bundle.update} cannot be diagnosed: out of GPU memory",
            hint="a diagnosis keeps more than a step does; on the CPU: CUDA_VISIBLE_DEVICES= floatline diagnose ...",
        ) from error
    except BundleError:
        raise
    except Exception as error:  # of the model's own code, on a batch that it does not know
        lacking = f"; the bundle is without {', '.join(bundle.left_out)}" if bundle.left_out else ""
        said = f"{type(error).__name__}: {getattr(error, 'message', error)}".splitlines()[0]
        raise BundleError(
            f"update {bundle.update} cannot be run again: {said}{lacking}",
            hint="build the model as the run did: the same code, the same versions",
        ) from error


def _checkpoint_of(bundle: Bundle, home: Path) -> Path | None:
    """Return the checkpoint whose weights are to be used; None for the bundle's own, or those of the start."""
    if bundle.weights is not None or not bundle.checkpoint:
        return None
    checkpoint = home / bundle.checkpoint
    if not checkpoint.is_dir():
        raise BundleError(
            f"the bundle of update {bundle.update} has no weights, and {checkpoint}, which it names, is gone",
            hint="restore it from a backup; a larger train.keep_last keeps checkpoints for longer",
        )
    return checkpoint


__all__ = ["Kept", "Replayed", "find_bundles", "replay_findings"]

"""One run, from the recipe to how it ended: its directory, its ranks, its record in run.json, and errors as advice.

What is trained is made in setup.py, and trained in loop.py. However a run ends, run.json says it: "finished", "stopped"
(by the guard, or interrupted; the same command goes on) or "failed".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from floatline.errors import FloatlineError, MemoryExceededError, NonFiniteError, RankLostError
from floatline.train.identity import is_same_recipe, refuse_other_recipe
from floatline.train.launch import joined, note_lost_rank
from floatline.train.loop import Loop
from floatline.train.manifest import Manifest
from floatline.train.recipe import Recipe
from floatline.train.rundir import open_run_directory
from floatline.train.setup import prepare
from floatline.train.stopper import Interrupted, Stopper


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        path: The run directory.
        rank: Of the process; several report the same run.
        status: "finished", "already finished" or "interrupted".
        evaluation: The last evaluation: of the test split where there is one, else of validation.
    """

    path: Path
    status: str
    evaluation: dict[str, Any] | None
    rank: int = 0


def train(recipe: Recipe, *, command: str = "", console: Console | None = None) -> RunResult:
    """Train what `recipe` describes, from the newest checkpoint in its run directory or from the start.

    Args:
        recipe: What to train; see `load_recipe`.
        command: Noted in run.json.
        console: Where progress goes, stderr by default.

    Raises:
        FloatlineError: Anything in recipe, data, model or disk that is not right; NonFiniteError when the guard stops
            the run.
    """
    with joined(recipe) as ranks, Stopper() as stopper, open_run_directory(recipe.run.dir, ranks) as rundir:
        console = Console(quiet=True) if ranks.rank else console or Console(stderr=True)
        manifest = Manifest(rundir)
        before = ranks.on_first(lambda: _finished_before(manifest, recipe))
        if before is not None:
            return RunResult(rundir.path, "already finished", before["result"], ranks.rank)
        manifest.begin(command)
        try:
            with ranks.watching():
                say = partial(console.print, markup=False, highlight=False)
                run = prepare(recipe, rundir, manifest, say, ranks)
                result = Loop(run, console, stopper).run()
        except (Interrupted, KeyboardInterrupt):
            manifest.end("stopped", "interrupted; run the same command again to go on")
            return RunResult(rundir.path, "interrupted", None, ranks.rank)
        except torch.OutOfMemoryError as error:
            _note_end(manifest, "failed", error)
            raise _explain_memory(error, recipe) from error
        except RankLostError as error:
            note_lost_rank(rundir, error)
            raise
        except Exception as error:
            _note_end(manifest, "stopped" if isinstance(error, NonFiniteError) else "failed", error)
            if isinstance(error, NonFiniteError):  # all ranks stop for the same reason
                error.told = ranks.rank > 0
            raise
        manifest.end("finished")
        return RunResult(rundir.path, "finished", result, ranks.rank)


def _finished_before(manifest: Manifest, recipe: Recipe) -> dict[str, Any] | None:
    """Return what an earlier run of this recipe found here, None where there is something left to do.

    Raises:
        RunDirectoryError: The directory is another recipe's.
    """
    tree = recipe.model_dump(mode="json")
    refuse_other_recipe(manifest, tree)
    if manifest.values.get("status") == "finished" and is_same_recipe(manifest, tree):
        return {"result": manifest.values.get("result")}
    return None


def _note_end(manifest: Manifest, status: str, error: Exception) -> None:
    try:
        manifest.end(status, str(error))
    except FloatlineError:  # a full disk: the error on the screen is all there is
        return


def _explain_memory(error: torch.OutOfMemoryError, recipe: Recipe) -> MemoryExceededError:
    micro = recipe.train.micro_batch_size or recipe.train.batch_size
    smaller = f"train.micro_batch_size={micro // 2} (the update stays the same)" if micro > 1 else "smaller images"
    return MemoryExceededError(f"out of GPU memory: {str(error).splitlines()[0]}", hint=f"try {smaller}")

"""The ranks of a run: the processes that torchrun started, or this one alone.

    torchrun --nproc-per-node 2 -m floatline train recipe.yaml techniques.sharding=true

A run that shards has a group of ranks even if it is of one, so that it reads and writes the same checkpoints. When a
rank is gone, those that are left say so on the screen and in run.json, and end; the next start resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from floatline.errors import ConfigError, FloatlineError, RankLostError
from floatline.techniques import OneRank
from floatline.techniques.distributed.groups import join_ranks, launched, leave_ranks
from floatline.train.manifest import Manifest
from floatline.train.recipe import Recipe
from floatline.train.rundir import RunDirectory


@contextmanager
def joined(recipe: Recipe) -> Iterator[OneRank]:
    """Return the ranks of the run that `recipe` describes; the group ends with the context.

    Raises:
        ConfigError: torchrun has started several processes, but the recipe does not shard.
    """
    if "sharding" not in recipe.used:
        with told_by_the_first():
            _refuse_idle_ranks()
        yield OneRank()
        return
    ranks = join_ranks("cuda" if torch.cuda.is_available() and recipe.hardware != "cpu" else "cpu").introduce()
    try:
        yield ranks
    except RankLostError:  # the group is broken: ending it in order would wait for the one that is gone
        raise
    except BaseException:
        leave_ranks()
        raise
    leave_ranks()


@contextmanager
def told_by_the_first() -> Iterator[None]:
    """Errors that every rank meets alike, before they have joined (a mistake in the recipe), are rank 0's to show."""
    try:
        yield
    except FloatlineError as error:
        error.told = launched()[0] > 0
        raise


def _refuse_idle_ranks() -> None:
    _, number = launched()
    if number > 1:
        raise ConfigError(
            f"torchrun has started {number} processes, but the recipe has no technique that shares a run out",
            hint="add techniques.sharding=true, or start it without torchrun",
        )


def refuse_uneven_batch(recipe: Recipe, ranks: OneRank) -> None:
    """Raise unless every rank gets equally many samples of each update.

    Raises:
        ConfigError: It says which batch sizes and how many ranks fit.
    """
    size = recipe.train.batch_size
    if size % ranks.size:
        raise ConfigError(
            f"train.batch_size={size} cannot be shared out evenly to {ranks.size} ranks",
            hint=f"use train.batch_size={-(-size // ranks.size) * ranks.size}, or one of "
            f"{[n for n in range(1, size + 1) if size % n == 0]} processes",
        )


def tell_what_ranks_cannot(recipe: Recipe, ranks: OneRank, say: Callable[[str], None]) -> None:
    """Say before the run starts what several ranks do in another way than one."""
    if ranks.size > 1 and recipe.guard.on_fault == "heal":
        say(
            f"guard.on_fault=heal: {ranks.size} ranks hold a share of the weights each, which a diagnosis wants whole; "
            "after a fault the run goes back and leaves the batch out, as with rollback. To heal, run the same command "
            "in one process"
        )


def note_lost_rank(rundir: RunDirectory, error: RankLostError) -> None:
    """Write into run.json that a rank is gone. Of the ranks that are left, one does that and tells the user."""

    def note(mine: RunDirectory) -> None:
        Manifest(mine).end("failed", str(error))

    error.told = not rundir.note_lost_rank(note)

"""A cure that came after the checkpoint a run goes on from has yet to happen."""

import pytest
import torch
import yaml

from floatline.train.checkpoint import STATE
from floatline.train.healed import as_of, change_recipe
from floatline.train.manifest import Manifest
from floatline.train.recipe import load_recipe
from floatline.train.resolve import resolve_recipe
from floatline.train.rundir import RunDirectory

FIRST, SECOND = "16-mixed; a=32", "16-mixed; a=32; b=32"


@pytest.fixture
def healed(recipe_file, tmp_path):
    """A run that was healed twice: (resolved recipe, run directory, run.json)."""
    resolved = resolve_recipe(load_recipe(recipe_file, ["precision=16-mixed"]), train_samples=48)
    with RunDirectory(tmp_path / "run") as rundir:
        manifest = Manifest(rundir)
        for policy in (FIRST, SECOND):
            change_recipe(resolved, rundir, manifest, "precision", policy, f"because of {policy}")
        yield resolved, rundir, manifest


def checkpoint(tmp_path, state):
    torch.save(state, tmp_path / STATE)
    return tmp_path


@pytest.mark.parametrize(("changes", "precision"), [(0, "16-mixed"), (1, FIRST), (2, SECOND)])
def test_the_recipe_is_put_back_to_the_checkpoints(healed, tmp_path, changes, precision):
    resolved, rundir, manifest = healed
    told = []
    as_of(checkpoint(tmp_path, {"findings": {"changes": changes}}), resolved, rundir, manifest, told.append)
    assert resolved.recipe.precision == str(resolved.policy) == precision and len(told) == 2 - changes
    text = (rundir.path / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["precision"] == precision
    assert ("because of" in text) is bool(changes)  # the reason of what is there, and no other
    again = Manifest(rundir).values
    assert again["resolved"]["precision"] == precision and len(again["healed"]) == changes


def test_a_checkpoint_that_counts_no_changes_keeps_them_all(healed, tmp_path):
    resolved, rundir, manifest = healed
    as_of(checkpoint(tmp_path, {}), resolved, rundir, manifest, lambda text: None)
    assert resolved.recipe.precision == SECOND


def test_from_the_start_nothing_has_been_healed(healed):
    resolved, rundir, manifest = healed
    as_of(None, resolved, rundir, manifest, lambda text: None)
    assert Manifest(rundir).values["healed"] == []

"""kill -9 and SIGTERM between a rollback and the next checkpoint: the run ends as the one that was not killed."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import spoilt_run
from floatline.report import load_run
from floatline.step import TrainStep
from floatline.train import load_recipe, train

SCRIPT = Path(__file__).parent.parent / "spoilt_run.py"
COMMON = ["train.steps=8", "train.checkpoint_every=3", "guard.snapshot_every=4", "eval.generate=false"]
POLICIES = {
    "rollback": (math.nan, ["guard.on_fault=rollback"]),  # the batch is left out
    "heal": (1e6, ["guard.on_fault=heal", "precision=16-mixed"]),  # fp16 has no such pixels: an island
}
KEPT = ("step", "loss", "grad_norm", "lr", "applied", "loss_scale")


def records(path, *kinds):
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] in kinds]


def story(path):
    """What a run has gone through, in order, without times."""
    said = []
    for record in records(path, "step", "fault", "cure", "eval"):
        keys = KEPT if record["kind"] == "step" else [key for key in record if key not in ("seconds", "samples_per_s")]
        said.append(json.dumps({key: record[key] for key in ("kind", *keys)}))
    return said


@pytest.fixture(scope="module", params=list(POLICIES))
def whole(request, digits, tmp_path_factory):
    """A run that is not killed, of each policy, with what it takes to run it again."""
    home = tmp_path_factory.mktemp(request.param)
    tree = {
        "model": {"path": str(digits / "model")},
        "data": {split: str(digits / f"data/{split}.jsonl") for split in ("train", "validation")},
        "precision": "bf16-mixed",
        "train": {"batch_size": 8, "lr": 1e-3},
        "eval": {"every": 8, "max_samples": 4},
        "run": {"threads": 1},
    }
    tree["data"]["max_answer_tokens"] = 8
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree))
    factor, overrides = POLICIES[request.param]
    overrides = [*COMMON, *overrides]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", spoilt_run.spoiling(None, factor, seen))
        train(load_recipe(home / "recipe.yaml", [*COMMON, "train.steps=6", f"run.dir={home / 'plain'}"]))
    bad = seen[5]  # of update 6: behind the snapshot of update 4 and the checkpoint of update 3
    spoil(home / "recipe.yaml", home / "whole", bad, factor, overrides)
    return home, bad, factor, overrides


def spoil(recipe, directory, bad, factor, overrides):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", spoilt_run.spoiling(bad, factor))
        return train(load_recipe(recipe, [*overrides, f"run.dir={directory}"]))


@pytest.mark.parametrize(("name", "moment"), [
    ("SIGKILL", "save"), ("SIGTERM", "before"), pytest.param("SIGKILL", "after", marks=pytest.mark.soak),
])  # fmt: skip
def test_a_run_that_is_killed_after_a_rollback_goes_on_alike(whole, tmp_path, name, moment):
    home, bad, factor, overrides = whole
    killed = tmp_path / "killed"
    line = [sys.executable, str(SCRIPT), str(bad), str(factor), name, moment, "train", str(home / "recipe.yaml")]
    done = subprocess.run(
        [*line, *overrides, f"run.dir={killed}"], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130), done.stderr
    bundles = sorted(path.name for path in (killed / "findings").iterdir())
    assert bundles == ["update-00000006"]
    before = yaml.safe_load((killed / "recipe.yaml").read_text())["precision"]
    result = spoil(home / "recipe.yaml", killed, bad, factor, overrides)
    assert result.status == "finished"
    assert story(killed) == story(home / "whole")
    assert [step.step for step in load_run(killed).steps] == list(range(1, 9))
    assert load_run(killed).faults == load_run(home / "whole").faults
    assert load_run(killed).cures == load_run(home / "whole").cures
    assert sorted(path.name for path in (killed / "findings").iterdir()) == bundles
    recipes = [yaml.safe_load((path / "recipe.yaml").read_text()) for path in (killed, home / "whole")]
    assert recipes[0]["precision"] == recipes[1]["precision"] == before
    assert result.evaluation == json.loads((home / "whole/run.json").read_text())["result"]

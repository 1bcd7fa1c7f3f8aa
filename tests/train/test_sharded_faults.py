"""A fault on one of two ranks: both see it, go back together, leave the batch out and finish alike."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from floatline.train import load_recipe
from floatline.train.launch import tell_what_ranks_cannot

SPOILT = Path(__file__).with_name("spoilt_rank.py")
STEPS, RANK, PLACE = 8, 1, 4


@pytest.fixture(scope="module", params=["rollback", pytest.param("heal", marks=pytest.mark.soak)])
def run(request, digits, tmp_path_factory):
    """A run with one bad batch on rank 1 in its fifth update: the directory, stderr, and what each rank was given."""
    import yaml

    home = tmp_path_factory.mktemp("faults")
    tree = {
        "model": {"path": str(digits / "model")},
        "data": {"train": str(digits / "data/train.jsonl"), "max_answer_tokens": 8},
        "precision": "32-true",
        "train": {"steps": STEPS, "batch_size": 8, "lr": 1e-3, "checkpoint_every": STEPS},
        "guard": {"on_fault": request.param, "snapshot_every": 3},
        "techniques": {"sharding": True},
        "run": {"threads": 1, "dir": str(home / "run")},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SPOILT)]
    done = subprocess.run(
        [sys.executable, *launcher, "train", str(home / "recipe.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SPOIL": f"{RANK}:{PLACE}", "SEEN": str(home)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return request.param, home / "run", done.stderr, [(home / str(rank)).read_text().split() for rank in (0, 1)]


def test_ranks_go_back_together_and_finish(run):
    _, path, err, seen = run
    manifest = json.loads((path / "run.json").read_text())
    assert manifest["status"] == "finished" and manifest["ranks"] == 2
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "step"}
    assert list(losses) == list(range(1, STEPS + 1)) and all(map(math.isfinite, losses.values()))
    assert err.count("went back to update 3") == 1 and len(seen[0]) == len(seen[1])


def test_the_batch_is_left_out_on_every_rank(run):
    """The update before it is made again with the same data, then comes the next one."""
    for mine in run[3]:
        assert mine[PLACE + 1] == mine[3] and mine.count(mine[PLACE]) == 1 and len(mine) == STEPS + 2


def test_ranks_that_cannot_heal_say_so_before_the_run(run):
    policy, _, err, _ = run
    assert err.count("guard.on_fault=heal: 2 ranks hold a share") == (1 if policy == "heal" else 0)
    if policy == "heal":
        assert err.index("guard.on_fault=heal") < err.index("went back to update 3")


@pytest.mark.parametrize(("policy", "size", "times"), [("heal", 2, 1), ("heal", 1, 0), ("rollback", 2, 0)])
def test_what_ranks_cannot_do_is_told(recipe_file, policy, size, times):
    told = []
    recipe = load_recipe(recipe_file, [f"guard.on_fault={policy}"])
    tell_what_ranks_cannot(recipe, SimpleNamespace(size=size), told.append)
    assert len(told) == times and all("the run goes back and leaves the batch out" in text for text in told)

"""A run that goes back: the batch at fault and no other is left out, and trouble with its findings ends nothing."""

import json
import math

import pytest
import torch
from torch import nn

import floatline.train.findings as findings
from floatline.diagnose.diagnose import diagnose
from floatline.step import TrainStep
from floatline.step.readback import Readback
from floatline.train import load_recipe, train
from floatline.train.position import Position


def fingerprint(batch):
    return int(batch[0]["input_ids"].sum()) if isinstance(batch, list) else int(batch["input_ids"].sum())


@pytest.fixture
def run(recipe_file, tmp_path, monkeypatch):
    """Trains with one batch spoilt whenever it comes; returns the batches as they came, and the loss of each update."""
    real = TrainStep.__call__

    def start(name, bad=None, kill_at=None, on_fault="rollback"):
        seen = []

        def call(step, batch):
            seen.append(fingerprint(batch))
            if len(seen) == kill_at:
                raise KeyboardInterrupt
            if seen[-1] == bad:
                for micro in batch if isinstance(batch, list) else [batch]:
                    micro["pixel_values"] = micro["pixel_values"] * math.nan
            return real(step, batch)

        monkeypatch.setattr(TrainStep, "__call__", call)
        overrides = [f"run.dir={tmp_path / name}", f"guard.on_fault={on_fault}", "guard.snapshot_every=3"]
        train(load_recipe(recipe_file, overrides))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return seen, {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}

    return start


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("place", [4, 5, 11])  # 6 batches are an epoch
def test_the_batch_at_fault_is_left_out_and_a_killed_run_goes_on_alike(run, monkeypatch, late, place):
    if late:  # as on a GPU
        monkeypatch.setattr(Readback, "waits", property(lambda readback: True))
    bad = run("plain")[0][place]
    seen, losses = run("whole", bad)
    assert seen.count(bad) == 1 and all(map(math.isfinite, losses.values())) and len(losses) == 12
    run("killed", bad, kill_at=9)
    assert run("killed", bad)[1] == losses


@pytest.mark.parametrize("trouble", ["no room", "diagnosis fails"])
def test_a_run_heals_as_far_as_it_can(run, monkeypatch, tmp_path, trouble):
    bad = run("plain")[0][4]
    if trouble == "no room":
        (tmp_path / "whole").mkdir()
        (tmp_path / "whole/findings").write_text("a file")
    else:
        monkeypatch.setattr(findings, "diagnose_rerun", lambda step, rerun: {}["key"])
    seen, losses = run("whole", bad, on_fault="heal")
    assert seen.count(bad) == 1 and len(losses) == 12 and all(map(math.isfinite, losses.values()))


def test_a_batch_is_left_out_by_how_far_behind_it_is():
    class Loader:
        def load_state_dict(self, state):
            pass

        def state_dict(self):
            return {}

    position = Position(Loader())
    start = position.state_dict()
    batches = position.counted("abcd")
    assert [next(batches) for _ in range(3)] == ["a", "b", "c"]
    position.load_state_dict(start)
    position.leave_out(behind=1)
    assert "".join(position.counted("abcd")) == "acd" and position.kept() == {"at": 4, "left_out": [2]}


def test_a_finding_that_cannot_be_written_ends_nothing(tmp_path):
    """A file stands where the directory of the bundle was."""
    told = []
    kept = findings.Findings(rundir=None, step=None, say=told.append, change_recipe=None)
    (tmp_path / "update-00000001").write_text("")
    finding = diagnose(lambda: (nn.Parameter(torch.zeros(1)) * 0.0).log().sum(), nn.Linear(1, 1), cures=False)
    kept._write(tmp_path / "update-00000001", finding)
    assert len(told) == 1 and "cannot write" in told[0]

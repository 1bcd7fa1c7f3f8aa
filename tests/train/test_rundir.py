"""The run directory: one writer, atomic files, metrics cut back on resume."""

import json
import os
import subprocess
import sys

import pytest

from floatline.errors import RunDirectoryError
from floatline.techniques import OneRank
from floatline.train.rundir import RunDirectory, SilentRunDirectory, open_run_directory


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    holder = (
        "import sys, time\nfrom floatline.train.rundir import RunDirectory\n"
        "run = RunDirectory(sys.argv[1])\nprint('in', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(RunDirectoryError, match=rf"in use by process {process.pid}\nhint: .*run.dir"):
            RunDirectory(tmp_path / "run")
    finally:
        process.kill()
        process.wait()
    RunDirectory(tmp_path / "run").close()  # the lock dies with its process


def test_a_file_in_the_way_and_no_permission(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is not a directory"):
        RunDirectory(tmp_path / "file")
    with pytest.raises(RunDirectoryError, match=r"cannot be written: .*\nhint: choose another run.dir"):
        RunDirectory("/proc/floatline")


def test_metrics_are_cut_back_to_a_checkpoint(tmp_path):
    with RunDirectory(tmp_path) as run:
        for step in range(1, 6):
            run.log({"kind": "step", "step": step, "loss": float("nan")})
        run.log({"kind": "eval", "split": "test", "step": 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    with RunDirectory(tmp_path) as run:
        run.cut_metrics(3)
        run.log({"kind": "step", "step": 4})
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(("logged", "left"), [
    (None, [1, 2]),  # of a run that did not keep it: by number
    (0, [1, 2]),
    ("there", [1, 3, 2]),
    ("inside a line", [1, 2]),
    ("gone", [1, 2]),
])  # fmt: skip
def test_what_was_logged_before_a_checkpoint_stays_whatever_its_number(tmp_path, logged, left):
    """Update 3 was at fault and the run went back: that belongs to the checkpoint of update 2, which came after it."""
    with RunDirectory(tmp_path) as run:
        assert run.logged() == 0
        run.log({"step": 1}), run.log({"kind": "fault", "step": 3}), run.log({"step": 2})
        at = {"there": run.logged(), "inside a line": run.logged() - 1, "gone": 10**6}.get(logged, logged)
        run.log({"step": 3})
    with RunDirectory(tmp_path) as run:
        run.cut_metrics(2, at)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == left


def test_replaced_files_are_whole_and_old_ones_survive_a_failed_write(tmp_path, monkeypatch):
    with RunDirectory(tmp_path) as run:
        run.write_json("run.json", {"a": 1})

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunDirectoryError, match=r"run.json could not be written: No space left on device"):
            run.write_json("run.json", {"a": 2})
        assert run.read_json("run.json") == {"a": 1}
        assert run.read_json("none.json") == {}


class Second(OneRank):
    """Rank 1, whose rank 0 has opened the directory or failed to."""

    rank, size = 1, 2

    def on_first(self, action):
        return None


def test_other_ranks_have_a_directory_that_writes_nothing(tmp_path):
    path = tmp_path / "run"
    with open_run_directory(path, Second()) as silent:
        silent.write_json("run.json", {}), silent.log({"step": 1}), silent.cut_metrics(0)
        assert not path.exists() and silent.read_json("run.json") == {} and silent.event_writer(0) is None
        assert silent.checkpoints == path / "checkpoints"


def test_a_lost_rank_is_noted_by_who_holds_the_lock_or_can_have_it(tmp_path):
    def note(rundir):
        rundir.write_json("run.json", {"status": "failed"})

    second = SilentRunDirectory(tmp_path)
    with RunDirectory(tmp_path) as first:
        assert not second.note_lost_rank(note) and not (tmp_path / "run.json").exists()
        assert first.note_lost_rank(note)
    (tmp_path / "run.json").unlink()
    assert second.note_lost_rank(note) and first.read_json("run.json") == {"status": "failed"}

"""The run directory: one writer, atomic files, metrics cut back on resume."""

import json
import os
import subprocess
import sys

import pytest

from floatline.errors import RunDirectoryError
from floatline.train.rundir import RunDirectory


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

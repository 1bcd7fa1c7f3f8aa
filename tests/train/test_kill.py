"""kill -9 at random moments, the same command again: the losses are those of a run that was never stopped."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest


def command(recipe_file, directory, *overrides):
    return [sys.executable, "-m", "floatline", "train", str(recipe_file), f"run.dir={directory}", *overrides]


def start(line):
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(line):
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def steps(directory):
    """The records of updates in a run's metrics, whole lines only: the run may be writing."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def logged(directory):
    """The last update in the run's metrics; 0 when there is none."""
    return max((record["step"] for record in steps(directory)), default=0)


def wait_for_update(process, directory, update=1):
    """Wait until this process has logged that update, so that kills fall into the run and not into imports."""
    path = directory / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before and logged(directory) >= update:
            return
        time.sleep(0.005)


def kill_and_resume(recipe_file, tmp_path, losses, kills, seed, overrides=()):
    """Kill a run `kills` times, each a little after an update drawn at random, and finish it: it must be the whole one.

    Returns how often it was still running. Where to kill is said in updates: a time would depend on the machine's load.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(command(recipe_file, whole, *overrides))
    expected = losses(whole)
    update_s = statistics.median(record["step_s"] for record in steps(whole))
    generator = random.Random(seed)
    hits = 0
    for update in sorted(generator.sample(range(1, len(expected)), kills)):
        process = start(command(recipe_file, killed, *overrides))
        wait_for_update(process, killed, update)
        time.sleep(generator.uniform(0, 2 * update_s))
        hits += process.poll() is None
        process.kill()
        process.wait()
    finish(command(recipe_file, killed, *overrides))
    assert losses(killed) == expected
    return hits


def test_killed_twice(recipe_file, tmp_path, losses):
    assert kill_and_resume(recipe_file, tmp_path, losses, kills=2, seed=0) >= 1


@pytest.mark.soak
def test_a_run_with_adapters_is_killed_once(recipe_file, tmp_path, losses):
    overrides = ["techniques.lora.dropout=0.1", "techniques.freezing.modules=[model.visual]"]
    kill_and_resume(recipe_file, tmp_path, losses, kills=1, seed=0, overrides=overrides)


@pytest.mark.soak
def test_a_run_in_fp8_is_killed_once(recipe_file, tmp_path, losses):
    overrides = ["precision=fp8-mixed; model.language_model.layers=fp8"]
    kill_and_resume(recipe_file, tmp_path, losses, kills=1, seed=0, overrides=overrides)


@pytest.mark.soak
@pytest.mark.parametrize("moment", range(20))
def test_killed_at_twenty_moments(recipe_file, tmp_path, losses, moment):
    kill_and_resume(recipe_file, tmp_path, losses, kills=1, seed=moment)


def test_sigterm_saves_and_the_same_command_goes_on(recipe_file, tmp_path, losses):
    finish(command(recipe_file, tmp_path / "whole"))
    line = command(recipe_file, tmp_path / "ended")
    process = start([*line])
    wait_for_update(process, tmp_path / "ended")
    os.kill(process.pid, signal.SIGTERM)
    process.communicate()
    assert process.returncode in (130, 0)
    finish(line)
    assert losses(tmp_path / "ended") == losses(tmp_path / "whole")


def test_a_file_size_limit_while_saving_is_one_clear_error(recipe_file, tmp_path):
    """A real failed write: the process may not write files beyond 200 kB, the model is larger."""
    line = f"ulimit -f 200; exec {' '.join(command(recipe_file, tmp_path / 'run'))}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "could not be written" in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "run/checkpoints").glob("*"))

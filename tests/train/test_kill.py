"""kill -9 at random moments, the same command again: the losses are those of a run that was never stopped."""

import os
import random
import signal
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


def wait_for_first_update(process, directory):
    """Wait until the run has logged an update, so that kills fall into the run and not into imports."""
    path = directory / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        time.sleep(0.01)


def kill_and_resume(recipe_file, tmp_path, losses, kills, seed, overrides=()):
    """Kill a run `kills` times while it trains, evaluates or saves; returns how often it was still running."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(command(recipe_file, whole, *overrides))
    wait_for_first_update(process, whole)
    began = time.monotonic()
    process.communicate()
    length = time.monotonic() - began
    generator = random.Random(seed)
    hits = 0
    for _ in range(kills):
        process = start(command(recipe_file, killed, *overrides))
        wait_for_first_update(process, killed)
        time.sleep(generator.uniform(0, 0.7 * length))
        hits += process.poll() is None
        process.kill()
        process.wait()
    finish(command(recipe_file, killed, *overrides))
    assert losses(killed) == losses(whole)
    return hits


def test_killed_three_times(recipe_file, tmp_path, losses):
    assert kill_and_resume(recipe_file, tmp_path, losses, kills=3, seed=0) >= 1


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
    wait_for_first_update(process, tmp_path / "ended")
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

"""Checkpoints: atomic, checked, pruned; nothing saved is lost."""

import json
import random

import numpy as np
import pytest
import torch

from floatline.errors import CheckpointError
from floatline.train import checkpoint, rng
from floatline.train.checkpoint import (
    find_fault,
    list_checkpoints,
    load_state,
    newest_sound,
    prune,
    save_checkpoint,
    set_damaged_aside,
)


def write_model(directory):
    (directory / "model.bin").write_bytes(b"weights" * 1000)


def save(tmp_path, step, state=None):
    return save_checkpoint(tmp_path, step, state or {"step": step}, write_model)


def test_round_trip(tmp_path):
    path = save(tmp_path, 7, {"x": torch.arange(3), "rng": rng.capture(), "none": None})
    assert path.name == "step-00000007" and find_fault(path) is None
    assert torch.equal(load_state(path)["x"], torch.arange(3))
    assert json.loads((path / "manifest.json").read_text())["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("name", ["model.bin", "trainer_state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_named_and_the_previous_one_is_used(tmp_path, name, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        middle = len(content) // 2
        content[middle] ^= 0xFF
        file.write_bytes(bytes(content[:middle]) if damage == "cut" else bytes(content))
    assert newest_sound(tmp_path) == good
    ((aside, fault),) = set_damaged_aside(tmp_path, good)
    assert name in fault and aside.name == "damaged-step-00000002" and not bad.exists()
    assert list_checkpoints(tmp_path) == [good]
    assert prune(tmp_path, keep_last=1, keep=set()) == []


@pytest.mark.parametrize(
    "text", ['{"files": []}', '{"files": {"model.bin": {}}}', '{"files": {}}', "[]", "\x00", '{"files": null}']
)
def test_any_manifest_is_sound_or_a_fault(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert "manifest.json" in find_fault(path)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* are damaged"):
        newest_sound(tmp_path)


def test_none_yet(tmp_path):
    assert newest_sound(tmp_path / "checkpoints") is None


def test_a_write_that_fails_leaves_earlier_ones_and_no_litter(tmp_path):
    good = save(tmp_path, 1)

    def full_disk(directory):
        (directory / "model.bin").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError,
        match=r"step-00000002 could not be written: the disk is full\nhint: earlier checkpoints are untouched",
    ):
        save_checkpoint(tmp_path, 2, {}, full_disk)
    assert list(tmp_path.iterdir()) == [good] and find_fault(good) is None


def test_a_kill_between_any_two_actions_leaves_a_sound_newest(tmp_path, monkeypatch):
    """Stop the save at each of its file-system actions in turn: the newest checkpoint is a whole one, old or new."""

    class Killed(BaseException):
        pass

    def dying_after(calls):
        left = [calls]

        def wrap(function):
            def run(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return function(*args, **kwargs)

            return run

        return wrap

    for calls in range(12):
        home = tmp_path / str(calls)
        save(home, 1), save(home, 2)
        with monkeypatch.context() as patch:
            wrap = dying_after(calls)
            for name in ("_sync_file", "_sync_directory", "_write_manifest", "_digest"):
                patch.setattr(checkpoint, name, wrap(getattr(checkpoint, name)))
            patch.setattr(checkpoint.Path, "rename", wrap(checkpoint.Path.rename))
            patch.setattr(checkpoint.shutil, "rmtree", wrap(checkpoint.shutil.rmtree))
            try:
                save(home, 3)
                prune(home, keep_last=1, keep=set())
            except Killed:
                pass
        newest = newest_sound(home)
        assert newest is not None and newest.name in ("step-00000002", "step-00000003")
        save(home, 3)
        prune(home, keep_last=1, keep=set())
        assert [p.name for p in home.iterdir()] == ["step-00000003"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    gone = prune(tmp_path, keep_last=2, keep={3})
    assert [checkpoint.step_of(p) for p in gone] == [1, 2, 4]
    assert [checkpoint.step_of(p) for p in list_checkpoints(tmp_path)] == [3, 5, 6]


def test_random_state_round_trip(tmp_path):
    path = save(tmp_path, 1, {"rng": rng.capture()})
    expected = (random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn())
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    rng.restore(load_state(path)["rng"])
    assert (random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn()) == expected

"""Runs of several ranks through torchrun: the loss curve of one process, lost ranks, checkpoints for any ranks.

Real gloo processes on the CPU; each costs seconds to start, so a run is made once and looked at from all sides.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from floatline.cli import OTHERS_SHOW_IT_S
from floatline.train import load_recipe, train
from floatline.train.checkpoint import find_fault, list_checkpoints

ON = "techniques.sharding=true"


@pytest.fixture(scope="module")
def recipe(digits, tmp_path_factory):
    """The recipe of the other tests, in fp32 and with a checkpoint every 4 of 12 updates; kept for this module."""
    import yaml

    home = tmp_path_factory.mktemp("sharded")
    tree = {
        "model": {"path": str(digits / "model")},
        "data": {split: str(digits / f"data/{split}.jsonl") for split in ("train", "validation", "test")},
        "precision": "32-true",
        "train": {"steps": 12, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 4, "keep_last": 9},
        "eval": {"every": 6, "max_samples": 8},
        "run": {"threads": 1},
    }
    tree["data"]["max_answer_tokens"] = 8
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(ranks, recipe, run, *overrides):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "floatline", "train", str(recipe), f"run.dir={run}", *overrides]


def start(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(*args):
    process = start(*args)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def one(recipe):
    """The run directory of one process, without sharding."""
    run = recipe.parent / "one"
    train(load_recipe(recipe, [f"run.dir={run}"]))
    return run


@pytest.fixture(scope="module")
def two(recipe):
    """The run directory of two ranks, and what they printed."""
    run = recipe.parent / "two"
    out, err = finish(2, recipe, run, ON)
    return run, out, err


def near(curve, other):
    """Losses and gradient norms equal to 1e-5, steps and learning rates to the bit."""
    assert [(step, lr) for step, _, _, lr in curve] == [(step, lr) for step, _, _, lr in other]
    for (_, loss, norm, _), (_, other_loss, other_norm, _) in zip(curve, other, strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-5, rel=1e-5)
        assert norm == pytest.approx(other_norm, abs=1e-5, rel=1e-5)
    return True


def records(run, kind):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record["kind"] == kind]


def manifest(run):
    return json.loads((run / "run.json").read_text())


def test_two_ranks_make_the_loss_curve_of_one_process(one, two, losses):
    run, _, _ = two
    assert len(losses(run)) == 12 and near(losses(run), losses(one))
    for mine, theirs in zip(records(run, "step"), records(one, "step"), strict=True):
        assert (mine["tokens"], mine["target_tokens"]) == (theirs["tokens"], theirs["target_tokens"])
    for mine, theirs in zip(records(run, "eval"), records(one, "eval"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and mine["accuracy"] == theirs["accuracy"]


def test_one_rank_writes_and_speaks(two):
    run, out, err = two
    assert out.count("Finished after 12 updates") == 1 and err.count("update 12/12") == 1
    assert manifest(run)["status"] == "finished" and manifest(run)["ranks"] == 2
    assert (run / "report.html").exists() and len(list((run / "tensorboard").iterdir())) == 1
    assert manifest(run)["parameters"]["total"] > 1e6
    (noted,) = manifest(run)["techniques"]
    assert "" in noted["touched"] and "2 ranks" in noted["notes"][0]


def test_every_checkpoint_is_sound_and_an_ordinary_model_directory(one, two):
    from transformers import AutoModelForImageTextToText

    run, _, _ = two
    checkpoints = list_checkpoints(run / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000004", "step-00000006", "step-00000008", "step-00000012"]
    for path in checkpoints:
        assert find_fault(path) is None
        files = json.loads((path / "manifest.json").read_text())["files"]
        assert {"shards/.metadata", "shards/__0_0.distcp", "shards/__1_0.distcp", "model.safetensors"} <= set(files)
    mine, theirs = (
        AutoModelForImageTextToText.from_pretrained(home / "checkpoints/step-00000012") for home in (run, one)
    )
    for (name, a), (_, b) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)  # Adam turns rounding of tiny gradients up


def back_to(source, target, keep):
    """A copy of a run as it was when it had `keep` checkpoints."""
    shutil.copytree(source, target)
    for path in list_checkpoints(target / "checkpoints")[keep:]:
        shutil.rmtree(path)
    (target / "run.json").write_text(json.dumps(manifest(target) | {"status": "running"}))
    return target


@pytest.mark.parametrize("overrides", [[ON], []], ids=["sharded", "plain"])
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(recipe, two, losses, tmp_path, overrides):
    run = back_to(two[0], tmp_path / "run", keep=1)
    train(load_recipe(recipe, [f"run.dir={run}", *overrides]))
    assert manifest(run)["resumed"][0]["at_step"] == 4 and manifest(run)["ranks"] == 1
    assert near(losses(run), losses(two[0]))


def test_a_checkpoint_of_two_ranks_goes_on_on_four(recipe, two, losses, tmp_path):
    run = back_to(two[0], tmp_path / "run", keep=3)
    finish(4, recipe, run, ON)
    assert manifest(run)["ranks"] == 4 and near(losses(run), losses(two[0]))


def test_a_plain_checkpoint_goes_on_sharded(recipe, one, losses, tmp_path):
    run = back_to(one, tmp_path / "run", keep=1)
    train(load_recipe(recipe, [f"run.dir={run}", ON]))
    assert losses(run) == losses(one)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true", "bf16-mixed; lm_head=32"])
def test_one_sharded_process_resumes_exactly(recipe, losses, tmp_path, precision):
    overrides = [ON, f"precision={precision}", "train.steps=6", "train.checkpoint_every=3", "eval.every=6"]
    train(load_recipe(recipe, [f"run.dir={tmp_path / 'whole'}", *overrides]))
    run = back_to(tmp_path / "whole", tmp_path / "run", keep=1)
    train(load_recipe(recipe, [f"run.dir={run}", *overrides]))
    assert manifest(run)["resumed"] and losses(run) == losses(tmp_path / "whole")


LORA = ["techniques.lora.rank=4", "techniques.lora.train_also=[model.visual.merger]"]


@pytest.fixture(scope="module")
def adapted(recipe):
    """The run directories of two sharded ranks and of one plain process, with LoRA."""
    two, one = recipe.parent / "lora-two", recipe.parent / "lora-one"
    finish(2, recipe, two, ON, *LORA)
    train(load_recipe(recipe, [f"run.dir={one}", *LORA]))
    return two, one


def test_two_ranks_with_adapters(adapted, losses):
    two, one = adapted
    assert near(losses(two), losses(one))
    mine, theirs = (list_checkpoints(run / "checkpoints")[-1] for run in adapted)
    names = {path.name for path in mine.iterdir()}
    assert names - {path.name for path in theirs.iterdir()} == {"shards"} and "model.safetensors" not in names
    config, other = ((path / "adapter_config.json").read_text() for path in (mine, theirs))
    assert config == other
    saved, expected = (load_file(path / "adapter_model.safetensors") for path in (mine, theirs))
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-4, msg=name)
    assert manifest(two)["parameters"] == manifest(one)["parameters"]
    assert manifest(two)["base"] == manifest(one)["base"]


@pytest.mark.parametrize("overrides", [[ON], []], ids=["sharded", "plain"])
def test_adapters_of_two_ranks_go_on_in_one_process(recipe, adapted, losses, tmp_path, overrides):
    two, _ = adapted
    run = back_to(two, tmp_path / "run", keep=1)
    train(load_recipe(recipe, [f"run.dir={run}", *LORA, *overrides]))
    assert manifest(run)["resumed"][0]["at_step"] == 4 and near(losses(run), losses(two))


def test_adapters_of_one_process_go_on_on_two_ranks(recipe, adapted, losses, tmp_path):
    _, one = adapted
    run = back_to(one, tmp_path / "run", keep=2)
    finish(2, recipe, run, ON, *LORA)
    assert manifest(run)["ranks"] == 2 and near(losses(run), losses(one))


@pytest.mark.parametrize(
    "settings", [["precision=16-mixed"], ["precision=bf16-mixed", "model.dtype=bf16"], ["precision=bf16-true"]]
)
def test_one_sharded_process_with_adapters_resumes_exactly(recipe, losses, tmp_path, settings):
    overrides = [ON, LORA[0], "techniques.lora.dropout=0.1", *settings]
    overrides += ["train.steps=6", "train.checkpoint_every=3", "eval.every=6"]
    train(load_recipe(recipe, [f"run.dir={tmp_path / 'whole'}", *overrides]))
    run = back_to(tmp_path / "whole", tmp_path / "run", keep=1)
    train(load_recipe(recipe, [f"run.dir={run}", *overrides]))
    assert manifest(run)["resumed"] and losses(run) == losses(tmp_path / "whole")


def ranks_of(launcher):
    """Process id of each rank that a torchrun process has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = next((v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = int(child)
    return found


def wait_for_update(process, run, step):
    path = run / "metrics.jsonl"
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_a_killed_rank_ends_the_run_clearly_and_one_rank_goes_on(recipe, losses, tmp_path, victim):
    overrides = [ON, "train.steps=30", "eval.every=100", "eval.generate=false", "eval.max_samples=2"]
    run = tmp_path / "run"
    process = start(2, recipe, run, *overrides)
    wait_for_update(process, run, 6)
    os.kill(ranks_of(process.pid)[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert err.count(f"of 2 is gone, so rank {1 - victim} cannot go on\nhint: run the same command again") == 1
    assert f"error: rank {victim} (process " in err
    ended = manifest(run)
    assert ended["status"] == "failed" and f"rank {victim} (process" in ended["error"]
    checkpoints = list_checkpoints(run / "checkpoints")
    assert checkpoints and all((path / "shards").is_dir() for path in checkpoints)
    train(load_recipe(recipe, [f"run.dir={run}", *overrides]))
    assert manifest(run)["resumed"][0]["at_step"] in (4, 8, 12, 16, 20, 24, 28)
    whole = tmp_path / "whole"
    train(load_recipe(recipe, [f"run.dir={whole}", *overrides[1:]]))
    assert near(losses(run), losses(whole))


def test_sigterm_stops_all_ranks_at_the_same_update(recipe, losses, tmp_path):
    overrides = [ON, "train.steps=40", "train.checkpoint_every=40", "eval.every=100", "eval.generate=false"]
    run = tmp_path / "run"
    process = start(2, recipe, run, *overrides)
    wait_for_update(process, run, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert manifest(run)["status"] == "stopped" and "interrupted" in manifest(run)["error"]
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert find_fault(checkpoint) is None and len(losses(run)) == int(checkpoint.name[-8:]) < 40


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        ([], "torchrun has started 2 processes, but the recipe has no technique", "add techniques.sharding=true"),
        (
            [ON, "train.batch_size=7"],
            "train.batch_size=7 cannot be shared out evenly to 2 ranks",
            "use train.batch_size=8",
        ),
    ],
)
def test_mistakes_are_told_once(recipe, tmp_path, overrides, message, hint):
    process = start(2, recipe, tmp_path / "run", *overrides)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count(f"error: {message}") == 1 and f"hint: {hint}" in err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_leaves_the_error_to_another_waits_to_be_ended(floatline, monkeypatch, recipe, rank):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    waited = []
    monkeypatch.setattr("floatline.cli.time.sleep", waited.append)
    done = floatline("train", recipe, "train.nonsense=1")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert waited == [OTHERS_SHOW_IT_S] * rank

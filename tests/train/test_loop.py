"""Whole runs on a real model class: start to end, resume, refusal, failure."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from floatline.errors import CheckpointError, MemoryExceededError, NonFiniteError, PrecisionError, RunDirectoryError
from floatline.train import load_recipe, train
from floatline.train.checkpoint import find_fault, list_checkpoints


@pytest.fixture
def run(recipe_file, tmp_path):
    """Train with overrides; `run(name, ...)` uses run directory `name`."""

    def start(name="run", *overrides):
        return train(load_recipe(recipe_file, [f"run.dir={tmp_path / name}", *overrides]))

    return start


def records(path, kind):
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def test_a_run_leaves_everything_a_reader_needs(run, tmp_path):
    result = run()
    home = tmp_path / "run"
    assert result.status == "finished" and result.evaluation["split"] == "test"
    assert [r["step"] for r in records(home, "step")] == list(range(1, 13))
    *validations, test = records(home, "eval")
    assert [(r["split"], r["samples"]) for r in validations] == [("validation", 8)] * 2
    assert test["split"] == "test" and test["samples"] == sum(g["total"] for g in test["groups"].values())
    manifest = json.loads((home / "run.json").read_text())
    assert manifest["status"] == "finished" and manifest["parameters"]["trainable"] > 1e5
    assert all(choice["reason"] for choice in manifest["choices"])
    assert len((home / "samples.jsonl").read_text().splitlines()) == test["samples"]
    assert list((home / "tensorboard").iterdir())
    assert all(find_fault(path) is None for path in list_checkpoints(home / "checkpoints"))
    step = records(home, "step")[0]
    assert step["loss"] > 0 and step["tokens"] > step["target_tokens"] > 0 and step["memory_bytes"] > 1e8


def test_every_checkpoint_loads_with_transformers(run, tmp_path):
    from transformers import AutoModelForImageTextToText

    run()
    for path in list_checkpoints(tmp_path / "run/checkpoints"):
        model = AutoModelForImageTextToText.from_pretrained(path)
        assert all(p.isfinite().all() for p in model.parameters())


def test_a_finished_run_is_not_run_again(run, tmp_path):
    run()
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert run().status == "already finished"
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_the_resolved_recipe_runs_the_same_again(run, tmp_path, losses):
    run("a")
    train(load_recipe(tmp_path / "a/recipe.yaml", [f"run.dir={tmp_path / 'b'}"]))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_evaluating_more_often_changes_no_loss(run, tmp_path, losses):
    run("a")
    run("b", "eval.every=1", "train.checkpoint_every=1")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_micro_batches_give_the_same_losses(run, tmp_path, losses):
    run("a", "precision=32-true")
    run("b", "precision=32-true", "train.micro_batch_size=2")
    for (_, loss, norm, _), (_, other, other_norm, _) in zip(
        losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True
    ):
        assert loss == pytest.approx(other, rel=1e-4) and norm == pytest.approx(other_norm, rel=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true", "16-true", "bf16-mixed; model.visual=32"])
def test_every_precision_runs_and_resumes_exactly(run, tmp_path, losses, precision):
    """A run that ends early and is resumed equals one that was never stopped."""
    run("run", f"precision={precision}")
    whole = losses(tmp_path / "run")
    _forget_the_end(tmp_path / "run", keep=1)
    run("run", f"precision={precision}")
    assert json.loads((tmp_path / "run/run.json").read_text())["resumed"]
    assert losses(tmp_path / "run") == whole


def _forget_the_end(home, keep):
    """Put a finished run back to where only its first `keep` checkpoints existed."""
    for path in list_checkpoints(home / "checkpoints")[keep:]:
        shutil.rmtree(path)
    manifest = json.loads((home / "run.json").read_text())
    (home / "run.json").write_text(json.dumps(manifest | {"status": "running"}))


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(run, tmp_path, losses, capsys):
    run("run", "train.keep_last=9")
    whole = losses(tmp_path / "run")
    _forget_the_end(tmp_path / "run", keep=2)
    victim = list_checkpoints(tmp_path / "run/checkpoints")[-1] / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    run("run", "train.keep_last=9")
    assert f"damaged checkpoint passed over: {victim}" in capsys.readouterr().err.replace("\n", "")
    assert losses(tmp_path / "run") == whole


def test_another_recipe_in_the_same_directory_is_refused(run):
    run()
    with pytest.raises(RunDirectoryError, match=r"holds a run of another recipe: train.lr was 0.001, now 0.5\nhint: "):
        run("run", "train.lr=0.5")


def test_changed_data_cannot_be_resumed(run, tmp_path, digits, recipe_file):
    copy = tmp_path / "data"
    shutil.copytree(digits / "data", copy)
    override = f"data.train={copy / 'train.jsonl'}"
    run("run", override)
    _forget_the_end(tmp_path / "run", keep=1)
    lines = (copy / "train.jsonl").read_text().splitlines()
    (copy / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(RunDirectoryError, match=r"has changed since this run began"):
        run("run", override)


def test_a_model_with_a_nan_weight_is_stopped_and_nothing_is_lost(run, tmp_path, digits):
    model = tmp_path / "model"
    shutil.copytree(digits / "model", model)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="stopped after 5 skipped updates in a row: the loss was nan at update 5"):
        run("run", f"model.path={model}", "train.steps=30")
    home = tmp_path / "run"
    assert json.loads((home / "run.json").read_text())["status"] == "stopped"
    assert [r["applied"] for r in records(home, "step")] == [False] * len(records(home, "step"))
    assert [(r["step"], r["what"]) for r in records(home, "fault")] == [(step, "loss") for step in range(1, 6)]


def test_a_full_disk_keeps_earlier_checkpoints(run, tmp_path, monkeypatch):
    from floatline.train import checkpoint

    saved = torch.save

    def full(state, path, *args):
        if "00000008" in str(path):
            raise OSError(28, "No space left on device")
        saved(state, path, *args)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step-00000008 could not be written: the disk is full"):
        run("run", "eval.every=100")
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000004"]
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert run("run", "eval.every=100").status == "finished"


def test_running_out_of_gpu_memory_says_what_to_try(run, tmp_path, monkeypatch):
    from floatline.train import loop

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(loop.Loop, "_update", full)
    with pytest.raises(MemoryExceededError, match=r"Tried to allocate 2.00 GiB.\nhint: try train.micro_batch_size=4"):
        run()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


def test_an_unexpected_error_is_noted_and_raised(run, tmp_path, monkeypatch):
    from floatline.train import loop

    monkeypatch.setattr(loop.Loop, "_update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


def _status(home):
    return json.loads((home / "run.json").read_text())["status"]


def test_a_mistaken_command_leaves_a_finished_run_finished(run, tmp_path):
    run()
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(RunDirectoryError):
        run("run", "train.lr=0.5")
    assert (tmp_path / "run/run.json").read_bytes() == before
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(RunDirectoryError):
        run("run", "train.lr=0.5")
    assert run().status == "already finished"


def test_checkpoints_without_their_run_json_are_nobodys(run, tmp_path):
    run()
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"run\.json is missing or damaged"):
        run("run", "train.lr=0.5")


def test_settings_that_change_nothing_learnt_may_change_on_resume(run, tmp_path, losses):
    run("run")
    whole = losses(tmp_path / "run")
    _forget_the_end(tmp_path / "run", keep=1)
    run("run", "guard.max_faults_in_a_row=9", "train.keep_last=5", "eval.batch_size=3")
    assert losses(tmp_path / "run") == whole
    resolved = json.loads((tmp_path / "run/run.json").read_text())["resolved"]
    assert (resolved["guard"]["max_faults_in_a_row"], resolved["train"]["keep_last"]) == (9, 5)


def test_weights_loaded_in_a_narrow_format_resume_exactly(run, tmp_path, losses):
    overrides = ["precision=32-true", "model.dtype=bf16"]
    run("run", *overrides)
    whole = losses(tmp_path / "run")
    _forget_the_end(tmp_path / "run", keep=1)
    run("run", *overrides)
    assert losses(tmp_path / "run") == whole


def test_auto_stays_what_it_was_on_another_machine(run, tmp_path, monkeypatch, losses):
    module = sys.modules["floatline.hardware.detect"]
    monkeypatch.setattr(module, "_cpu_formats", lambda flags: frozenset())
    module._detect_cpu.cache_clear(), module.detect.cache_clear()
    run("run", "precision=auto")
    whole = losses(tmp_path / "run")
    _forget_the_end(tmp_path / "run", keep=1)
    monkeypatch.setattr(module, "_cpu_formats", lambda flags: frozenset({"bf16"}))
    module._detect_cpu.cache_clear(), module.detect.cache_clear()
    run("run", "precision=auto")
    monkeypatch.undo()
    module._detect_cpu.cache_clear(), module.detect.cache_clear()
    manifest = json.loads((tmp_path / "run/run.json").read_text())
    assert losses(tmp_path / "run") == whole and manifest["resolved"]["precision"] == "32-true"
    assert next(c for c in manifest["choices"] if c["key"] == "precision")["value"] == "32-true"


def test_a_replaced_image_is_noticed(run, tmp_path, digits):
    copy = tmp_path / "data"
    shutil.copytree(digits / "data", copy)
    override = f"data.train={copy / 'train.jsonl'}"
    run("run", override)
    _forget_the_end(tmp_path / "run", keep=1)
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(next((copy / "images/train").glob("*.png")))
    with pytest.raises(RunDirectoryError, match=r"or an image it shows has changed"):
        run("run", override)


def test_a_damaged_best_checkpoint_does_not_block_the_end(run, tmp_path, capsys):
    run("run", "train.keep_last=9")
    home = tmp_path / "run"
    best = json.loads((home / "run.json").read_text())["best"]["best_step"]
    manifest = json.loads((home / "run.json").read_text())
    (home / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    (home / f"checkpoints/step-{best:08d}/config.json").write_text("{}")
    assert run("run", "train.keep_last=9").status == "finished"


def test_a_disk_too_full_for_tensorboard_does_not_end_the_run(run, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert run().status == "finished"
    assert "TensorBoard events stop here" in capsys.readouterr().err


def test_metrics_with_a_broken_byte_can_be_resumed(run, tmp_path, losses):
    run()
    whole = losses(tmp_path / "run")
    _forget_the_end(tmp_path / "run", keep=1)
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{")
    run()
    assert losses(tmp_path / "run") == whole


def test_precision_is_checked_before_the_data(run):
    with pytest.raises(PrecisionError, match="bf17"):
        run("run", "precision=bf17", "data.train=/nope.jsonl")

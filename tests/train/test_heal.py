"""The whole chain on a real model class: verdict, rollback, replay, first bad op, cause, cure, and on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from floatline.errors import ConfigError, NonFiniteError
from floatline.report import load_run, render_text, write_html
from floatline.step import TrainStep
from floatline.train import load_recipe, train

FC1 = "model.visual.blocks.0.mlp.linear_fc1"


@pytest.fixture
def hot_model(digits, tmp_path):
    """The tiny Qwen3-VL, one MLP of whose vision tower overflows fp16: its first weight is scaled up, its second down.

    In fp32 it computes about what it did before, for large activations pass GELU unchanged.
    """
    from transformers import AutoModelForImageTextToText

    shutil.copytree(digits / "model", tmp_path / "hot")
    model = AutoModelForImageTextToText.from_pretrained(digits / "model")
    mlp = model.model.visual.blocks[0].mlp
    with torch.no_grad():
        mlp.linear_fc1.weight.mul_(1e6)
        mlp.linear_fc2.weight.div_(1e6)
    model.save_pretrained(tmp_path / "hot")
    return tmp_path / "hot"


@pytest.fixture
def run(recipe_file, tmp_path):
    def start(name, *overrides):
        return train(load_recipe(recipe_file, [f"run.dir={tmp_path / name}", *overrides]))

    return start


def records(path, *kinds):
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] in kinds]


def last_loss(path):
    return records(path, "step")[-1]["loss"]


def test_an_overflowing_module_becomes_an_island_and_the_run_ends_as_in_fp32(run, hot_model, tmp_path, capsys):
    common = [f"model.path={hot_model}", "train.lr=1e-4"]
    run("fp32", "precision=32-true", *common)
    result = run("healed", "precision=16-mixed", "guard.on_fault=heal", "guard.snapshot_every=4", *common)
    home = tmp_path / "healed"
    assert result.status == "finished"
    cures = records(home, "cure")
    assert cures and cures[0]["what"] == "island" and cures[0]["finding"].startswith("forward: ")
    assert f" of {FC1}" in cures[0]["finding"].splitlines()[0] and "overflow" not in cures[0]["value"]
    resolved = yaml.safe_load((home / "recipe.yaml").read_text())
    assert resolved["precision"].startswith("16-mixed; model.visual.blocks.0.mlp")
    assert "the replay was finite" in (home / "recipe.yaml").read_text()  # its reason stands beside it
    faults = records(home, "fault")
    assert any(fault["action"] == "rollback" and fault["to"] == 0 for fault in faults)
    assert last_loss(home) == pytest.approx(last_loss(tmp_path / "fp32"), rel=0.02)
    assert all(record["applied"] for record in records(home, "step")[-4:])
    told = capsys.readouterr().err
    assert "healed at update 1: precision = 16-mixed; " in told and "floatline diagnose " in told
    report = render_text([load_run(home)])
    write_html([load_run(home)], home / "report.html")
    assert "Healed at update 1: precision = 16-mixed; " in report and "rollback" in report
    assert FC1 in (home / "report.html").read_text()
    assert [step.step for step in load_run(home).steps] == list(range(1, 13))


def test_the_resolved_recipe_starts_healed(run, hot_model, tmp_path):
    common = [f"model.path={hot_model}", "train.steps=4"]
    run("healed", "precision=16-mixed", "guard.on_fault=heal", *common)
    train(load_recipe(tmp_path / "healed/recipe.yaml", [f"run.dir={tmp_path / 'again'}"]))
    assert not records(tmp_path / "again", "cure")
    assert all(math.isfinite(record["loss"]) for record in records(tmp_path / "again", "step"))


def test_without_healing_it_is_skipped_and_stopped_and_kept(run, hot_model, tmp_path):
    with pytest.raises(NonFiniteError, match="skipped updates in a row"):
        run("run", "precision=16-mixed", f"model.path={hot_model}", "guard.max_faults_in_a_row=2")
    findings = sorted((tmp_path / "run/findings").iterdir())
    assert [path.name for path in findings] == ["update-00000001", "update-00000002"]
    assert not records(tmp_path / "run", "cure")


def test_a_kept_step_is_diagnosed_later_from_the_command_line(run, hot_model, tmp_path, floatline):
    with pytest.raises(NonFiniteError):
        run("run", "precision=16-mixed", f"model.path={hot_model}", "guard.on_fault=stop")
    home = tmp_path / "run"
    done = floatline("diagnose", str(home))
    assert (
        done.returncode == 1
        and "update 1: reproduced" in done.stdout
        and f"of {FC1}" in done.stdout
        and "cured" in done.stdout
    )
    finding = json.loads((home / "findings/update-00000001/finding.json").read_text())
    assert finding["module"] == FC1 and finding["cause_name"] == "overflow"
    told = json.loads(floatline("diagnose", str(home / "findings/update-00000001"), "--json").stdout)
    assert told[0]["outcome"] == "reproduced" and told[0]["finding"]["phase"] == "forward"


@pytest.mark.parametrize(("make", "said"), [
    (lambda home: home, "is no run or bundle"),
    (lambda home: _written(home / "findings/update-00000001/bundle.pt", b"nonsense"), "is not loaded"),
    (lambda home: _saved(home / "findings/update-00000001/bundle.pt", {"version": 99}), "no bundle of version 1"),
    (lambda home: _saved(home / "findings/update-00000001/bundle.pt", Path("x")), "nothing in it was run"),
])  # fmt: skip
def test_what_is_no_bundle_is_refused(tmp_path, recipe_file, floatline, make, said):
    shutil.copy(recipe_file, tmp_path / "recipe.yaml") if not (tmp_path / "recipe.yaml").exists() else None
    done = floatline("diagnose", str(make(tmp_path)))
    assert done.returncode == 2 and said in done.stderr


def _written(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path.parent


def _saved(path, value):
    path.parent.mkdir(parents=True)
    torch.save(value, path)
    return path.parent


@pytest.fixture
def steep(monkeypatch):
    """Makes the loss ten million times as large, as one that is a sum over pixels may be; fp16 gradients overflow."""
    real = TrainStep.__init__

    def made(step, *args, **kwargs):
        real(step, *args, **kwargs)
        inner = step.loss
        step.loss = lambda model, batch: inner(model, batch) * 1e7

    monkeypatch.setattr(TrainStep, "__init__", made)


SCALED = ["precision=16-mixed", "guard.on_fault=heal", "train.steps=6", "train.checkpoint_every=2",
          "train.loss_scale=4", "eval.generate=false"]  # fmt: skip


def test_a_loss_scale_that_still_overflows_at_1_is_lowered_and_stays_low(run, steep, tmp_path, capsys, monkeypatch):
    assert run("healed", *SCALED).status == "finished"
    home = tmp_path / "healed"
    faults = [(fault["step"], fault["what"], fault["action"]) for fault in records(home, "fault")]
    assert faults[:3] == [(1, "overflow", "skip"), (2, "overflow", "skip"), (3, "gradient", "rollback")]  # 4, 2, 1
    (cure,) = records(home, "cure")
    scale = 2.0**-8
    assert (cure["what"], cure["key"], cure["value"]) == ("scale", "train.loss_scale", str(scale))
    assert (
        "in the backward of" in cure["reason"]
        and f"at a loss scale of {scale:g} the replay was finite" in (cure["reason"])
    )
    steps = load_run(home).steps
    course = [(1, False, 2.0), (2, False, 1.0), *((n, True, scale) for n in range(3, 7))]
    assert [(step.step, step.applied, step.loss_scale) for step in steps] == course
    text = (home / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["train"]["loss_scale"] == scale and "the replay was finite" in text
    assert f"healed at update 3: train.loss_scale = {scale}" in capsys.readouterr().err

    real, calls = TrainStep.__call__, []

    def killed(step, batch):
        calls.append(batch)
        if len(calls) == 7:  # in update 6, for update 3 was made again: behind the checkpoint of update 4
            raise KeyboardInterrupt
        return real(step, batch)

    monkeypatch.setattr(TrainStep, "__call__", killed)
    assert run("killed", *SCALED).status == "interrupted"
    assert run("killed", *SCALED).status == "finished" and len(calls) == 7 + 2
    resumed = load_run(tmp_path / "killed").steps
    assert [(step.step, step.applied, step.loss_scale) for step in resumed] == course
    assert [step.grad_norm for step in resumed[2:]] == [step.grad_norm for step in steps[2:]]
    again = train(load_recipe(home / "recipe.yaml", [f"run.dir={tmp_path / 'again'}"]))
    assert again.status == "finished" and not records(tmp_path / "again", "fault", "cure")


def test_an_overflow_that_a_lower_scale_mends_by_itself_is_no_fault(run, tmp_path):
    run("plain", "precision=16-mixed", "guard.on_fault=heal", "train.steps=4", "train.loss_scale=1e9")
    faults = records(tmp_path / "plain", "fault")
    assert faults and {fault["what"] for fault in faults} == {"overflow"}
    assert not records(tmp_path / "plain", "cure") and not (tmp_path / "plain/findings").exists()
    assert yaml.safe_load((tmp_path / "plain/recipe.yaml").read_text())["train"]["loss_scale"] == 1e9


def test_a_loss_scale_where_no_loss_is_scaled_is_refused(run):
    with pytest.raises(ConfigError, match=r"train.loss_scale=4, but precision bf16-mixed scales no loss"):
        run("run", "precision=bf16-mixed", "train.loss_scale=4")


def test_headroom_is_logged_when_it_is_looked_at_and_reported(run, tmp_path):
    run("run", "precision=16-mixed", "train.steps=4", "guard.sample_every=2", "eval.generate=false")
    looks = records(tmp_path / "run", "headroom")
    assert [look["step"] for look in looks] == [2, 4]
    for look in looks:
        bits = list(look["bits"].values())
        assert len(bits) == 16 < look["modules"] and bits == sorted(bits) and 0 < bits[0] < 16
    assert "Least headroom to overflow (2 steps sampled" in render_text([load_run(tmp_path / "run")])

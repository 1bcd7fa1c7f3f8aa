"""The whole chain on a real model class: verdict, rollback, replay, first bad op, cause, cure, and on."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from floatline.errors import NonFiniteError
from floatline.report import load_run, render_text, write_html
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


def records(path, kind):
    lines = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


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

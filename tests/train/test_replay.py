"""`floatline diagnose`: the answer comes whatever the disk does, and each mistake is one clear error."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

import floatline.diagnose.bundle as bundles
import floatline.train.replay as replay
import spoilt_run
from floatline.errors import NonFiniteError, RunDirectoryError
from floatline.step import TrainStep
from floatline.train import load_recipe, train

UPDATE = "findings/update-00000002"


@pytest.fixture(scope="module")
def stopped(digits, tmp_path_factory):
    """A run that was stopped at update 2, whose pixels fp16 does not have; its checkpoint is of update 1."""
    home = tmp_path_factory.mktemp("stopped")
    tree = {
        "model": {"path": str(digits / "model")},
        "data": {"train": str(digits / "data/train.jsonl"), "max_answer_tokens": 8},
        "precision": "16-mixed",
        "train": {"steps": 3, "batch_size": 8, "lr": 1e-3, "checkpoint_every": 1},
        "guard": {"on_fault": "stop"},
        "run": {"threads": 1},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(tree))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", spoilt_run.spoiling(None, 1.0, seen))
        train(load_recipe(home / "recipe.yaml", [f"run.dir={home / 'plain'}"]))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NonFiniteError):
        patch.setattr(TrainStep, "__call__", spoilt_run.spoiling(seen[1], 1e6))
        train(load_recipe(home / "recipe.yaml", [f"run.dir={home / 'run'}"]))
    shutil.rmtree(home / "plain")
    return home / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def rewritten(run, **values):
    """Change a bundle as if it had been written so."""
    file = run / UPDATE / bundles.FILE
    torch.save(torch.load(file, weights_only=True) | values, file)


@pytest.mark.parametrize("place", ["", "findings", UPDATE, f"{UPDATE}/bundle.pt"])
def test_a_run_its_findings_one_of_them_and_the_file_in_it(run, floatline, place):
    done = floatline("diagnose", run / place)
    assert done.returncode == 1 and "update 2: reproduced" in done.stdout and done.stderr.count("warning") == 0
    assert json.loads((run / UPDATE / "finding.json").read_text())["cause_name"] == "overflow"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_answer_comes_from_a_run_directory_that_cannot_be_written(run, floatline, monkeypatch, as_json):
    def refuse(path, data):
        raise RunDirectoryError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(bundles, "write_whole", refuse)
    done = floatline("diagnose", run, *(["--json"] if as_json else []))
    assert done.returncode == 1 and "reproduced" in done.stdout
    assert "warning: the finding is not kept: cannot write" in done.stderr and "Read-only" in done.stderr
    if as_json:
        assert json.loads(done.stdout)[0]["finding"]["module"] == "model.visual.patch_embed.proj"


def test_one_damaged_bundle_does_not_cost_the_answer_about_another(run, floatline):
    shutil.copytree(run / UPDATE, run / "findings/update-00000001")
    file = run / "findings/update-00000001/bundle.pt"
    file.write_bytes(file.read_bytes()[:1000])
    done = floatline("diagnose", run)
    assert done.returncode == 1 and "update 2: reproduced" in done.stdout
    assert str(file) in done.stderr and "hint: " in done.stderr
    told = json.loads(floatline("diagnose", run, "--json").stdout)
    assert [each["outcome"] for each in told] == ["not run", "reproduced"] and str(file) in told[0]["error"]


def test_what_ends_the_second_replay_leaves_the_first_answer(run, floatline, monkeypatch):
    shutil.copytree(run / UPDATE, run / "findings/update-00000003")
    calls = []

    def fails_then(*args):
        calls.append(args)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    real = replay.replay
    monkeypatch.setattr(replay, "replay", fails_then)
    done = floatline("diagnose", run)
    assert "update 2: reproduced" in done.stdout and done.returncode == 1
    assert "update 2 cannot be diagnosed: out of GPU memory" in done.stderr  # the copy's own number


def _gone(run):
    shutil.rmtree(run)
    return run


def _empty(run):
    shutil.rmtree(run)
    run.mkdir()
    return run


def _none_kept(run):
    shutil.rmtree(run / "findings")
    return run


def _truncated(run):
    file = run / UPDATE / "bundle.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return run


def _without_recipe(run):
    (run / "recipe.yaml").unlink()
    return run


def _model_moved(run):
    text = (run / "recipe.yaml").read_text()
    tree = yaml.safe_load(text)
    (run / "recipe.yaml").write_text(text.replace(tree["model"]["path"], "/nowhere/model"))
    return run


def _checkpoint_gone(run):
    rewritten(run, weights=None, checkpoint="checkpoints/step-00000007", left_out=("the weights (9.0 MiB)",))
    return run


def _other_weights(run):
    values = torch.load(run / UPDATE / "bundle.pt", weights_only=True)
    rewritten(run, weights=dict(list(values["weights"].items())[1:]))
    return run


def _other_batch(run):
    _rerun_with(run, {"pixels": torch.ones(1)})
    return run


def _no_batch_at_all(run):
    _rerun_with(run, 3)
    return run


def _rerun_with(run, batch):
    values = torch.load(run / UPDATE / "bundle.pt", weights_only=True)
    rewritten(run, reruns=[{**rerun, "batch": batch} for rerun in values["reruns"]])


@pytest.mark.parametrize(("make", "said", "hint"), [
    (_other_batch, "update 2 cannot be run again: ", "the same code, the same versions"),
    (_no_batch_at_all, "update 2 cannot be run again: ConfigError: a batch must be a dict", "the same code"),
    (_gone, "does not exist", "pass a run directory"),
    (_empty, "is no run or bundle", "pass a run directory"),
    (_none_kept, "1 update of {run} condemned, and none kept", "run it again on one rank"),
    (_truncated, "bundle.pt", "cut short"),
    (_without_recipe, "has no recipe two directories up", "--recipe RUN/recipe.yaml"),
    (_model_moved, "model.path=/nowhere/model: no such directory (named by {run}/recipe.yaml)", "pass --recipe with"),
    (_checkpoint_gone, "no weights, and {run}/checkpoints/step-00000007, which it names, is gone", "train.keep_last"),
    (_other_weights, "the bundle is of another model: it has no ", "build the model as the run did"),
])  # fmt: skip
def test_each_mistake_is_one_error_with_what_to_do(run, floatline, make, said, hint):
    done = floatline("diagnose", make(run))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("error: ") == 1 and said.format(run=run) in done.stderr
    assert hint in done.stderr.partition("hint: ")[2] and "Traceback" not in done.stderr


def test_a_wrong_recipe_is_told(run, floatline, tmp_path):
    done = floatline("diagnose", run, "--recipe", tmp_path / "none.yaml")
    assert done.returncode == 2 and "none.yaml does not exist" in done.stderr
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["techniques"] = {"lora": {"rank": 2}}  # another run's: with adapters
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
    done = floatline("diagnose", run, "--recipe", tmp_path / "other.yaml")
    assert done.returncode == 2 and "the bundle is of another model" in done.stderr and done.stdout == ""


def test_a_model_that_moved_is_found_by_a_mended_recipe(run, floatline, tmp_path):
    shutil.copy(run / "recipe.yaml", tmp_path / "mended.yaml")
    done = floatline("diagnose", _model_moved(run), "--recipe", tmp_path / "mended.yaml")
    assert done.returncode == 1 and "reproduced" in done.stdout


def test_a_run_in_which_nothing_was_condemned_is_fine(run, floatline):
    _none_kept(run)
    (run / "metrics.jsonl").write_text("")
    done = floatline("diagnose", run)
    assert done.returncode == 0 and done.stdout == "" and "no update of it was condemned: there is noth" in done.stderr
    assert json.loads(floatline("diagnose", run, "--json").stdout) == []


def test_a_run_that_is_still_going_is_told(run, floatline):
    values = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(values | {"status": "running"}))
    (run / ".lock").write_text(str(os.getpid()))
    done = floatline("diagnose", run)
    assert done.returncode == 1 and f"{run} is still going; these are its findings so far" in done.stderr
    (run / ".lock").write_text("0x")
    assert floatline("diagnose", run).stderr == ""


def test_a_bundle_without_weights_runs_on_its_checkpoint_and_says_so(run, floatline):
    rewritten(run, weights=None, buffers={}, left_out=("the weights (9.0 MiB, and 0.1 of 1.0 MiB were left)",))
    done = floatline("diagnose", run)
    assert done.returncode == 1 and "update 2: reproduced; the bundle is without the weights (9.0 MiB" in done.stdout
    assert "weights and buffers are those of checkpoints/step-00000001" in done.stdout


def test_a_bundle_without_its_batch_is_not_run(run, floatline):
    values = torch.load(run / UPDATE / "bundle.pt", weights_only=True)
    reruns = [rerun | {"batch": None} for rerun in values["reruns"]]
    rewritten(run, reruns=reruns, left_out=("micro-batch 0 (9.0 MiB, and 1.0 of 1.0 MiB were left)",))
    done = floatline("diagnose", run)
    assert done.returncode == 2 and "update 2: not run; there is no batch to run; the bundle is without micro-ba" in (
        done.stdout
    )


def test_only_compiled_is_a_fault_and_not_reproduced_is_none():
    def code(outcome):
        return replay.Replayed(path=None, replay=SimpleNamespace(outcome=outcome, at_fault=outcome != OTHER)).exit_code

    OTHER = "not reproduced"
    assert (code("only compiled"), code(OTHER), code("not run")) == (1, 0, 2)

"""What the optimizer spoils reaches no checkpoint, and a checkpoint that holds it is refused by name."""

import math

import pytest
import torch

from floatline.errors import CheckpointError, NonFiniteError
from floatline.step import TrainStep
from floatline.train import load_recipe, train
from floatline.train.checkpoint import list_checkpoints

SHORT = ["train.steps=4", "train.checkpoint_every=2", "eval.generate=false", "precision=32-true"]


@pytest.fixture
def run(recipe_file, tmp_path):
    return lambda: train(load_recipe(recipe_file, [f"run.dir={tmp_path / 'run'}", *SHORT]))


@pytest.fixture
def poison(monkeypatch):
    """Puts a NaN into the first moment before an update, as a fault of memory or of arithmetic would."""
    real, on = TrainStep.__call__, {}

    def spoilt(step, batch):
        if step.updates + 1 == on.get("update"):
            next(iter(step.optimizer.state.values()))["exp_avg"].view(-1)[0] = math.nan
        return real(step, batch)

    monkeypatch.setattr(TrainStep, "__call__", spoilt)
    return on


def test_no_checkpoint_is_written_of_what_the_optimizer_has_spoilt(run, poison, tmp_path):
    poison["update"] = 4
    with pytest.raises(
        NonFiniteError, match=r"before the checkpoint of update 4: .* the optimizer made it so"
    ) as caught:
        run()
    assert "fl.diagnose" in caught.value.hint
    assert [path.name for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]
    poison.clear()
    assert run().status == "finished"  # from the sound one


def test_a_poisoned_checkpoint_is_refused_by_name(run, poison, tmp_path, monkeypatch):
    poison["update"] = 4
    monkeypatch.setattr("floatline.train.loop.not_finite", lambda *_: "")  # as a checkpoint from elsewhere may be
    run()
    monkeypatch.setattr("floatline.train.run._finished_before", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"step-00000004 is not finite: \S+") as caught:
        run()
    assert "remove it" in caught.value.hint


def test_torch_knows_no_better():
    """Why it is looked at: a moment that is NaN passes every check of loss and gradients."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.state[weight]["exp_avg"][0] = math.nan
    optimizer.step()
    assert weight.grad.isfinite().all() and weight.isnan().any()

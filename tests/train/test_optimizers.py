"""`train.optimizer`: what each choice stands for, that it trains and resumes, and that small updates arrive."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from floatline.errors import ConfigError
from floatline.train import load_recipe, train
from floatline.train.optimizers import TECHNIQUES
from floatline.train.recipe import parse_recipe
from floatline.train.resolve import resolve_recipe
from floatline.train.setup import make_step

BASE = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}, "hardware": "cpu"}
ADAMW = {"lr": 1e-5, "weight_decay": 0.0}


def recipe(optimizer=None, precision="bf16-true", techniques=None, **more):
    train = {"optimizer": optimizer, "steps": 300, "schedule": "constant", "warmup_steps": 0, **ADAMW}
    return parse_recipe({**BASE, "precision": precision, "train": train, "techniques": techniques or {}, **more})


def resolved(*args, **kwargs):
    return resolve_recipe(recipe(*args, **kwargs), train_samples=100)


@pytest.mark.parametrize(
    ("optimizer", "precision", "expected"),
    [
        (None, "bf16-true", set()),
        ("adamw", "bf16-true", {"master_weights"}),
        ("adamw", "bf16-true; lm_head=32", {"master_weights"}),
        ("adamw", "bf16-mixed", set()),
        ("adamw", "16-true", set()),
        ("adamw", "auto", set()),
        ("adamw-plain", "bf16-true", set()),
        ("kahan", "bf16-true", {"kahan"}),
        ("stochastic-rounding", "bf16-true", {"stochastic_rounding"}),
        ("low-bit", "bf16-true", {"low_bit_optimizer"}),
        ("low-bit", "32-true", {"low_bit_optimizer"}),
    ],
)
def test_a_choice_stands_for_a_technique(optimizer, precision, expected):
    made = recipe(optimizer, precision)
    assert set(made.techniques) == expected
    again = parse_recipe(made.model_dump(mode="json"))
    assert again.techniques == made.techniques  # a resolved recipe reads as it was written
    if "low_bit_optimizer" in expected:
        assert made.techniques["low_bit_optimizer"]["stochastic_rounding"] is (precision == "bf16-true")


def test_the_techniques_own_settings_stay():
    asked = {"kahan": {"library": "optimi"}}
    assert recipe("kahan", techniques=asked).techniques["kahan"]["library"] == "optimi"


def test_what_is_open_is_filled_in_with_the_reason():
    def said(*args, **kwargs):
        found = resolved(*args, **kwargs)
        choice = next(c for c in found.choices if c.key == "train.optimizer")
        assert found.recipe.train.optimizer == choice.value
        return choice.value, choice.reason

    assert said(precision="bf16-mixed") == (
        "adamw",
        "the optimizer steps fp32 weights, so that no small update is lost",
    )
    value, reason = said()
    assert value == "adamw-plain" and "rounded away; adamw (fp32 master weights), kahan" in reason
    for choice, technique in TECHNIQUES.items():
        assert said(techniques={technique: True}) == (choice, f"techniques.{technique} is set")
    assert said(techniques={"master_weights": True})[0] == "adamw"


def test_a_technique_that_a_choice_brought_has_its_reason():
    choice = next(c for c in resolved("adamw").choices if c.key == "techniques.master_weights")
    assert choice.value["moments"] == "fp32" and choice.reason == "train.optimizer=adamw in bf16-true"


@pytest.mark.parametrize(
    ("optimizer", "precision", "techniques", "text", "hint"),
    [
        ("kahan", "bf16-true", {"stochastic_rounding": True},
         "train.optimizer=kahan and techniques.stochastic_rounding are two optimizers",
         "set techniques.stochastic_rounding=null"),
        ("adamw", "bf16-true", ["kahan"], "train.optimizer=adamw and techniques.kahan", "leave train.optimizer open"),
        ("adamw", "bf16-mixed", {"low_bit_optimizer": True}, "and techniques.low_bit_optimizer are two", "=null"),
        ("adamw-plain", "bf16-true", {"master_weights": True}, "adamw-plain and techniques.master_weights", "=null"),
        ("kahan", "bf16-true", {"kahan": None}, "which techniques.kahan switches off", "another train.optimizer"),
        ("adam", "bf16-true", {}, "train.optimizer='adam'", "allowed: adamw, adamw-plain, kahan"),
        ("kahan", "bf16-true", {"kahan": {"library": "optimi", "moments": "fp32"}}, "moments is 'fp32'", "optimi"),
        ("kahan", "bf16-true", {"kahan": {"library": "torchao"}}, "kahan.library is 'torchao'", "floatline, optimi"),
    ],
)  # fmt: skip
def test_contradictions_are_told(optimizer, precision, techniques, text, hint):
    with pytest.raises(ConfigError) as caught:
        recipe(optimizer, precision, techniques)
    assert text in caught.value.message and hint in caught.value.hint


def test_a_plan_adds_no_other_optimizer():
    assert "low_bit_optimizer" in recipe("adamw", "bf16-mixed", memory="auto").left_out
    assert "low_bit_optimizer" not in recipe("low-bit", "bf16-mixed", memory="auto").left_out
    assert recipe(None, "bf16-mixed", memory="auto").left_out == ()


SMALL = ["precision=bf16-true", "train.steps=6", "train.checkpoint_every=3", "eval.every=6", "eval.max_samples=4",
         "data.test=null"]  # fmt: skip
TRAINED = {
    "adamw": ["train.optimizer=adamw"],
    "kahan of optimi": ["train.optimizer=kahan", "techniques.kahan.library=optimi"],
    "stochastic-rounding of torchao": [
        "train.optimizer=stochastic-rounding",
        "techniques.stochastic_rounding.library=torchao",
    ],
}
"""Those whose techniques test_techniques.py does not train."""


def require(name):
    for library in ("optimi", "torchao"):
        if library in name:
            pytest.importorskip(library)


@pytest.mark.parametrize("name", TRAINED)
def test_each_trains_from_a_recipe_and_resumes_to_the_bit(name, recipe_file, losses, tmp_path):
    """Six updates at a stretch, and three, a stop and three more."""
    require(name)
    whole = load_recipe(recipe_file, [*SMALL, *TRAINED[name]])
    assert train(whole).status == "finished"
    halves = load_recipe(recipe_file, [*SMALL, *TRAINED[name], f"run.dir={tmp_path / 'halves'}"])
    train(halves)
    shutil.rmtree(tmp_path / "halves/checkpoints/step-00000006")
    record = json.loads((tmp_path / "halves/run.json").read_text())
    (tmp_path / "halves/run.json").write_text(json.dumps({**record, "status": "failed"}))
    assert train(halves).status == "finished"
    assert losses(whole.run.dir) == losses(halves.run.dir)
    written = yaml.safe_load((tmp_path / "halves/recipe.yaml").read_text())
    assert written["train"]["optimizer"] == TRAINED[name][0].partition("=")[2]
    assert set(written["techniques"]) == set(whole.techniques)


class Net(nn.Module):
    """What the steps of `floatline train` expect: a model that answers with its loss."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 1))

    def forward(self, x, y):
        return SimpleNamespace(loss=F.mse_loss(self.layers(x).float(), y.float()))


def displacement(optimizer, precision, techniques=None):
    """How far 300 updates at lr 1e-5 move weights that start at bf16 numbers, as the setup of a run makes them."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    start = [parameter.detach().double().clone() for parameter in model.parameters()]
    step = make_step(model, resolved(optimizer, precision, techniques))
    for update in range(300):
        generator = torch.Generator().manual_seed(update % 20)
        x = torch.randn(32, 64, generator=generator)
        assert bool(step({"x": x, "y": x.sum(1, keepdim=True).sin()}).applied)
    pairs = zip(model.parameters(), start, strict=True)
    return torch.cat([(parameter.detach().double() - before).flatten() for parameter, before in pairs])


@pytest.fixture(scope="module")
def fp32():
    return displacement("adamw", "32-true")


MOVING = {
    "fp32 master weights": ("adamw", None, 0.15),
    "Kahan": ("kahan", None, 0.15),
    "Kahan of optimi": ("kahan", {"kahan": {"library": "optimi"}}, 0.15),
    "stochastic rounding": ("stochastic-rounding", None, 0.65),
    "stochastic rounding of torchao": (
        "stochastic-rounding",
        {"stochastic_rounding": {"library": "torchao"}},
        0.65,
    ),
}
"""Choice, techniques, and the error that is allowed: the last rounding to bf16 alone, or the noise of 300 of them."""


@pytest.mark.parametrize("name", MOVING)
def test_300_steps_at_1e_5_move_the_weights_as_fp32_does(name, fp32):
    """Within 3 % of fp32's way, in its direction; plain bf16 makes a fortieth of it (below)."""
    require(name)
    optimizer, techniques, error = MOVING[name]
    moved = displacement(optimizer, "bf16-true", techniques)
    assert float(moved @ fp32 / (fp32 @ fp32)) == pytest.approx(1.0, abs=0.03)
    assert float((moved - fp32).norm() / fp32.norm()) < error


def test_300_steps_at_1e_5_of_plain_bf16_do_not(fp32):
    moved = displacement("adamw-plain", "bf16-true")
    assert float(moved @ fp32 / (fp32 @ fp32)) < 0.1
    assert float((moved == 0).double().mean()) > 0.9  # nine in ten weights have not moved at all

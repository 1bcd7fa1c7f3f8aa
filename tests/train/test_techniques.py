"""Techniques in recipes: how they are written, spelled out, refused, and which may change on resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from floatline.errors import ConfigError, FloatlineError, RunDirectoryError
from floatline.techniques import HOMES
from floatline.train import load_recipe, train
from floatline.train.checkpoint import list_checkpoints, load_state
from floatline.train.recipe import parse_recipe
from floatline.train.techniques import technique_tree, with_free_techniques

BASE = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}


def techniques_of(value):
    return parse_recipe({**BASE, "techniques": value}).techniques


def test_mapping_and_list_are_the_same():
    spelled = {"accumulation": {"micro_batches": 4}}
    assert techniques_of({"accumulation": {"micro_batches": 4}, "checkpointing": None}) == spelled
    assert techniques_of(["accumulation(micro_batches=4)"]) == spelled
    assert techniques_of("accumulation(micro_batches=4)") == spelled
    assert techniques_of({"accumulation": True}) == {"accumulation": {"micro_batches": 8}}
    assert techniques_of({"accumulation": False}) == {} == techniques_of(None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"checkpoint": True}, "recipe: there is no technique 'checkpoint'\nhint: did you mean 'checkpointing'"),
        ({"accumulation": {"batches": 2}}, "recipe: accumulation has no setting 'batches'\nhint: did you mean"),
        ({"accumulation": {"micro_batches": 0}}, "recipe: accumulation.micro_batches is 0\nhint: give 1 or more"),
        ({"accumulation": {"micro_batches": "x"}}, "accumulation.micro_batches is 'x'\nhint: allowed: a whole number"),
        ({"accumulation": 3}, "techniques.accumulation is 3\nhint: write true, null, or its settings"),
        (["accumulation", "accumulation"], "techniques names accumulation twice\nhint: keep one of them"),
        (["accumulation(2)"], "'accumulation(2)' is not a technique\nhint: write a name, or name(setting=value, ...)"),
        (3, "techniques is 3\nhint: write {checkpointing: true, ...} or a list of names"),
    ],
)
def test_bad_techniques_are_explained(value, text):
    with pytest.raises(ConfigError) as error:
        techniques_of(value)
    assert text in str(error.value)


def test_precision_as_a_technique_is_the_recipes_precision():
    tree = technique_tree({**BASE, "techniques": {"precision": {"policy": "bf16-mixed"}}})
    assert tree["precision"] == "bf16-mixed" and tree["techniques"] == {}
    with pytest.raises(ConfigError, match=r"precision=32-true and techniques\.precision\.policy=bf16-mixed"):
        technique_tree({**tree, "precision": "32-true", "techniques": {"precision": {"policy": "bf16-mixed"}}})


def test_what_changes_the_maths_stays_on_resume():
    stored = {"lora": {"rank": 8}, "checkpointing": {"every": 2}}
    asked = {"offload": {"min_bytes": 0}}
    assert with_free_techniques(stored, asked) == {"lora": {"rank": 8}, "offload": {"min_bytes": 0}}


def test_overrides_switch_and_set(recipe_file):
    recipe = load_recipe(recipe_file, ["techniques.accumulation=true", "techniques.accumulation.micro_batches=2"])
    assert recipe.techniques == {"accumulation": {"micro_batches": 2}}
    assert load_recipe(recipe_file, ["techniques.accumulation=true", "techniques.accumulation=null"]).techniques == {}


def test_a_run_with_accumulation_equals_micro_batches_and_says_so(recipe_file, losses, tmp_path):
    small = ["precision=32-true", "train.steps=3", "eval.generate=false", "train.checkpoint_every=3"]
    by_technique = load_recipe(recipe_file, [*small, "techniques.accumulation.micro_batches=4"])
    by_size = load_recipe(recipe_file, [*small, "train.micro_batch_size=2", f"run.dir={tmp_path / 'other'}"])
    assert train(by_technique).status == train(by_size).status == "finished"
    assert losses(by_technique.run.dir) == losses(by_size.run.dir)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["techniques"][0]["technique"] == "accumulation(micro_batches=4)"
    choice = next(c for c in record["choices"] if c["key"] == "train.micro_batch_size")
    assert choice["value"] == 2 and choice["reason"] == "techniques.accumulation.micro_batches=4 of 8 samples"


def _forget_the_end(home, keep):
    """Put a finished run back to where only its first `keep` checkpoints existed."""
    for path in list_checkpoints(home / "checkpoints")[keep:]:
        shutil.rmtree(path)
    record = json.loads((home / "run.json").read_text())
    (home / "run.json").write_text(json.dumps(record | {"status": "running"}))


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_run_with_a_frozen_tower_saves_whole_models_and_resumes_exactly(
    recipe_file, digits, losses, tmp_path, precision
):
    few = [f"precision={precision}", "train.steps=4", "train.checkpoint_every=2", "eval.every=4", "eval.generate=false"]
    recipe = load_recipe(recipe_file, [*few, "techniques.freezing.modules=[model.visual]"])
    train(recipe)
    home = tmp_path / "run"
    whole = losses(home)
    path = list_checkpoints(home / "checkpoints")[-1]
    saved, start = (load_file(place / "model.safetensors") for place in (path, digits / "model"))
    assert saved.keys() == start.keys()
    moved = {name for name in saved if not torch.equal(saved[name], start[name].to(saved[name].dtype))}
    assert moved and not any(name.startswith("model.visual.") for name in moved)
    trained = sum(value.numel() for name, value in start.items() if not name.startswith("model.visual."))
    record = json.loads((home / "run.json").read_text())
    assert record["parameters"]["trainable"] == trained < record["parameters"]["total"]
    moments = load_state(path)["step"]["optimizer"]["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == trained
    _forget_the_end(home, keep=1)
    train(recipe)
    assert json.loads((home / "run.json").read_text())["resumed"] and losses(home) == whole
    other = load_recipe(recipe_file, [*few, "techniques.freezing.modules=[model.visual.blocks]"])
    with pytest.raises(
        RunDirectoryError, match=r"another recipe: techniques\.freezing\.modules was \['model\.visual'\]"
    ):
        train(other)


def test_accumulation_that_does_not_fit(recipe_file):
    with pytest.raises(ConfigError, match=r"micro_batches=3 and train.micro_batch_size=4 do not fit"):
        train(load_recipe(recipe_file, ["techniques.accumulation.micro_batches=3", "train.micro_batch_size=4"]))


def test_a_run_may_go_on_with_other_accumulation_but_not_with_another_rank(recipe_file):
    small = ["train.steps=2", "eval.generate=false", "train.checkpoint_every=1"]
    train(load_recipe(recipe_file, small))
    again = load_recipe(recipe_file, [*small, "techniques.accumulation.micro_batches=2"])
    assert train(again).status == "already finished"
    with pytest.raises(RunDirectoryError, match=r"another recipe: train.lr"):
        train(load_recipe(recipe_file, [*small, "train.lr=5e-3"]))


SMALL = ["precision=32-true", "train.steps=6", "train.checkpoint_every=3", "eval.every=6", "eval.max_samples=4",
         "data.test=null"]  # fmt: skip
EACH = {
    "precision": ["precision=auto", "techniques.precision.policy=bf16-mixed"],
    "accumulation": ["techniques.accumulation.micro_batches=2"],
    "checkpointing": ["techniques.checkpointing=true"],
    "attention": ["techniques.attention.kernel=math"],
    "offload": ["techniques.offload.to=disk"],
    "sharding": ["techniques.sharding=true"],
    "batching": ["techniques.batching.max_tokens=256", "techniques.batching.window=2"],
    "packing": ["techniques.packing=true"],
    "low_bit_optimizer": ["techniques.low_bit_optimizer=true"],
    "optimizer_offload": ["techniques.optimizer_offload=true"],
    "master_weights": ["techniques.master_weights=true", "precision=bf16-true"],
    "kahan": ["techniques.kahan=true", "precision=bf16-true"],
    "stochastic_rounding": ["techniques.stochastic_rounding=true", "precision=bf16-true"],
    "optimizer_in_backward": ["techniques.optimizer_in_backward=true", "train.max_grad_norm=null"],
    "freezing": ["techniques.freezing.modules=[model.visual]"],
    "lora": ["techniques.lora.rank=2"],
    "chunked_loss": ["techniques.chunked_loss.chunk_tokens=64"],
    "compile": ["techniques.compile.backend=aot_eager"],
}


def test_every_technique_is_switched_on_here():
    assert set(EACH) == set(HOMES)


@pytest.mark.parametrize("name", EACH)
def test_each_trains_from_a_recipe_and_resumes_to_the_bit(name, recipe_file, losses):
    """Six updates at a stretch, and three, a stop and three more."""
    if name == "sharding":
        pytest.skip("a group of ranks ends with its process: test_sharded.py")
    recipe = load_recipe(recipe_file, [*SMALL, *EACH[name]])
    assert train(recipe).status == "finished"
    home, whole = Path(recipe.run.dir), losses(recipe.run.dir)
    shutil.rmtree(home / "checkpoints/step-00000006")
    manifest = json.loads((home / "run.json").read_text())
    (home / "run.json").write_text(json.dumps({**manifest, "status": "failed"}))
    assert train(recipe).status == "finished"
    assert json.loads((home / "run.json").read_text())["resumed"][0]["at_step"] == 3
    assert losses(home) == whole
    named = [t["technique"].partition("(")[0] for t in manifest["techniques"]]
    assert named == ([] if name == "precision" else [name])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["batching.max_tokens=256", "accumulation.micro_batches=2"], "and techniques.accumulation both make"),
        (["packing=true"], "packing and train.micro_batch_size=4 both make micro-batches"),
        (["optimizer_in_backward=true"], "optimizer_in_backward cannot be used in this step"),
        (["kahan=true", "stochastic_rounding=true"], "cannot be combined"),
        (["batching.max_tokens=3"], "max_tokens"),
        (["freezing.modules=[model.vision]"], "near names: model.visual"),
        (["lora.targets=[model.language_model.layers.*.q]"], "near names"),
    ],
)
def test_what_does_not_go_together_is_explained(overrides, text, recipe_file):
    more = ["train.micro_batch_size=4"] if overrides == ["packing=true"] else []
    with pytest.raises(FloatlineError) as error:
        train(load_recipe(recipe_file, [*SMALL, *more, *(f"techniques.{o}" for o in overrides)]))
    assert text in str(error.value) and error.value.hint

"""`memory: auto`: what is planned, what becomes of it in the recipe, what is refused, and what a resume keeps."""

import io
import json
import pickle
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from floatline.errors import ConfigError, MemoryExceededError, ModelError, RunDirectoryError
from floatline.hardware import CATALOG, Hardware
from floatline.plan import advice, fit
from floatline.techniques import make_technique
from floatline.train import load_recipe, train
from floatline.train import plan_recipe as plan_recipe_module
from floatline.train.checkpoint import list_checkpoints
from floatline.train.data import load_samples
from floatline.train.data.largest import largest_update, sizes_of
from floatline.train.identity import with_free_keys
from floatline.train.parts import encoder_of
from floatline.train.plan_recipe import decides_cut, plan_apart, plan_recipe, workload_of

SHORT = ["precision=bf16-mixed", "train.steps=2", "train.checkpoint_every=1", "eval.generate=false", "data.test=null",
         "eval.max_samples=2", "hardware=tiny", "memory=auto"]  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """Puts a GPU of so many MiB into the catalog, "tiny", and takes a prediction's error to be as small as it is."""

    def make(mebibytes):
        monkeypatch.setattr(fit, "ABSOLUTE_ERROR", 2**18)
        gpu = Hardware(name="tiny", capability=(8, 0), memory=int(mebibytes * 2**20))
        monkeypatch.setitem(CATALOG, "tiny", gpu)
        return gpu

    return make


@pytest.fixture
def recipe(recipe_file):
    def load(*overrides):
        return load_recipe(recipe_file, [*SHORT, *overrides])

    return load


def record(run, name="run.json"):
    return json.loads((run / name).read_text())


def plain_peak(recipe):
    """Peak of the recipe's step with nothing added, in MiB."""
    return plan_recipe(workload_of(recipe), advice=False).estimate.peak_total / 2**20


# What is planned


def test_the_largest_update_has_the_longest_sample_and_the_most_images():
    assert largest_update([9, 30, 12, 20], [8, 0, 10, 0], 2) == [1, 2]
    assert largest_update([9, 30, 12, 20], [8, 0, 10, 0], 2, by_tokens=True) == [1, 3]
    assert largest_update([5, 5, 5], [0, 1, 2], 3) == [2, 1, 0]


def test_the_batch_is_as_wide_as_the_longest_sample(recipe, tiny, digits):
    tiny(1000)
    asked = workload_of(recipe("train.batch_size=4"))
    encoder = encoder_of(recipe())
    lengths, images = sizes_of(load_samples(digits / "data/train.jsonl", encoder=encoder).good, encoder)
    assert asked.batch["input_ids"].shape == (4, max(lengths)) and asked.rows == 4
    assert len(asked.batch["pixel_values"]) == 4 * sum(sorted(images)[-4:])  # 2 x 2 patches make a token
    assert asked.precision == "bf16-mixed" and asked.hardware.name == "tiny" and asked.exclude == ()


def test_a_batch_that_the_recipe_cuts_is_cut_that_way(recipe, tiny):
    tiny(1000)
    asked = workload_of(recipe("train.micro_batch_size=2"))
    assert [len(batch["input_ids"]) for batch in asked.batch] == [2, 2, 2, 2] and asked.exclude == ("accumulation",)
    widths = [batch["input_ids"].shape[1] for batch in asked.batch]
    assert widths[0] == max(widths)
    by_parts = workload_of(recipe("techniques.accumulation.micro_batches=4"))
    assert len(by_parts.batch) == 4 and by_parts.techniques == () and by_parts.exclude == ("accumulation",)
    budget = workload_of(recipe("techniques.batching.max_tokens=60"))
    assert all(batch["input_ids"].numel() <= 60 for batch in budget.batch) and decides_cut(budget.recipe)
    packed = workload_of(recipe("techniques.packing=true", "techniques.accumulation.micro_batches=2"))
    assert [t.name for t in packed.techniques] == ["packing", "accumulation"] and packed.exclude == ()


def test_ranks_share_the_batch(recipe, tiny):
    tiny(1000)
    asked = workload_of(recipe("techniques.sharding=true"), ranks=2)
    assert asked.rows == 4 and len(asked.batch["input_ids"]) == 4 and asked.sharded


def test_weights_are_not_read(recipe, tiny, digits, tmp_path):
    tiny(1000)
    shutil.copytree(digits / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"not weights")
    given = recipe(f"model.path={tmp_path / 'model'}", "train.batch_size=2")
    assert plan_recipe(workload_of(given)).fits
    assert plan_recipe(workload_of(given)).probe.model == "Qwen3VLForConditionalGeneration"


def test_a_config_that_no_model_has(recipe, tiny, digits, tmp_path):
    tiny(1000)
    shutil.copytree(digits / "model", tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match=r"ViTConfig is no vision-language or causal model's\nhint: model\.path must"):
        plan_recipe(workload_of(recipe(f"model.path={tmp_path / 'model'}")))


def test_attention_and_format_are_the_recipes(recipe, tiny):
    tiny(1000)
    work = workload_of(recipe("model.attention=eager", "precision=bf16-true")).work
    model = work.build_model()
    assert model.config.text_config._attn_implementation == "eager"
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.bfloat16"}
    group = work.build_optimizer(model).param_groups[0]
    assert group["fused"] and group["lr"] == 1e-3


def test_shards_are_planned_in_another_process(recipe, tiny):
    tiny(1000)
    told = []
    asked = workload_of(recipe("techniques.sharding=true", "train.batch_size=4"), ranks=2)
    whole = sum(parameter.nbytes for parameter in asked.work.build_model().parameters())
    shared = plan_apart(asked, lambda what, done: told.append((what, done)))
    assert shared.fits and told == [("sharding on 2 tiny", 0)]
    assert 0.5 * whole <= shared.estimate.states["parameters"] < 0.52 * whole


def test_errors_of_the_other_process_arrive(recipe, tiny, monkeypatch):
    """What that process writes, without starting it: a start takes seconds."""
    tiny(1000)
    asked = replace(workload_of(recipe("train.batch_size=2")), exclude=("offlod",))
    out = SimpleNamespace(buffer=io.BytesIO())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pickle.dumps(asked))))
    monkeypatch.setattr(sys, "stdout", out)
    plan_recipe_module._answer()
    error = pickle.loads(out.buffer.getvalue())
    assert isinstance(error, ConfigError)
    assert str(error) == "there is no technique 'offlod'\nhint: did you mean 'offload'?"


# What becomes of it


def test_a_run_that_fits_as_it_is_gets_nothing(recipe, tiny, tmp_path):
    tiny(1000)
    train(recipe("train.batch_size=2", "train.steps=1"))
    choices = record(tmp_path / "run")["choices"]
    assert choices[0]["key"] == "memory" and choices[0]["value"] is None
    assert choices[0]["reason"].startswith("planned for tiny: fits, ") and choices[0]["reason"].endswith(" of 1000 MiB")
    assert record(tmp_path / "run")["techniques"] == [] and record(tmp_path / "run", "plan.json")["trials"] == 1


def test_a_batch_that_does_not_fit_is_cut(recipe, tiny, tmp_path, losses):
    tiny(1000)
    peak = plain_peak(recipe("train.batch_size=16"))
    tiny(0.9 * peak)
    train(recipe("train.batch_size=16"))
    home = tmp_path / "run"
    plan, run = record(home, "plan.json"), record(home)
    parts = plan["recipe"]["techniques"].pop("accumulation")
    assert plan["verdict"] == "fits" and plan["ladder"][0]["verdict"] == "does not fit"
    assert plan["recipe"]["techniques"] == {} and plan["samples"] == 16 and plan["ranks"] == 1
    choices = {choice["key"]: choice for choice in run["choices"]}
    number = 8 if parts is True else parts["micro_batches"]
    assert choices["train.micro_batch_size"]["value"] == 16 // number
    assert choices["train.micro_batch_size"]["reason"] == (
        f"{number} micro-batches of 16 samples, the fewest with which the plan fits"
    )
    assert " without what the plan adds" in choices["memory"]["reason"]
    written = yaml.safe_load((home / "recipe.yaml").read_text())
    assert written["memory"] is None and written["train"]["micro_batch_size"] == 16 // number
    by_hand = recipe("train.batch_size=16", f"train.micro_batch_size={16 // number}", "memory=null",
                     f"run.dir={tmp_path / 'other'}")  # fmt: skip
    train(by_hand)
    assert losses(home) == losses(tmp_path / "other") and not (tmp_path / "other/plan.json").exists()


def test_techniques_of_the_plan_are_trained_with_and_kept_on_resume(recipe, tiny, tmp_path, losses):
    whole = ["train.batch_size=16", "train.micro_batch_size=16"]
    tiny(1000)
    fixed = workload_of(recipe(*whole))
    texts = ("checkpointing(keep='matmul')", "low_bit_optimizer")
    recomputed, low_bit = (
        plan_recipe(replace(fixed, techniques=(make_technique(text),))).estimate.peak_total for text in texts
    )
    tiny(min(recomputed, low_bit) / 2**20)  # with the reserve neither fits alone
    train(recipe(*whole))
    home = tmp_path / "run"
    run, before = record(home), losses(home)
    used = [t["technique"] for t in run["techniques"]]
    assert sorted(used) == ["checkpointing(keep=('matmul',))", "low_bit_optimizer"]
    choice = next(choice for choice in run["choices"] if choice["key"] == "techniques.checkpointing")
    assert choice["value"]["keep"] == ["matmul"]
    assert choice["reason"].startswith("the plan needs it: it takes ") and choice["reason"].endswith(" off the peak")
    assert "checkpointing:  # the plan needs it" in (home / "recipe.yaml").read_text()

    shutil.rmtree(list_checkpoints(home / "checkpoints")[-1])
    (home / "run.json").write_text(json.dumps({**run, "status": "stopped"}))
    plan = (home / "plan.json").read_text()
    tiny(1000)  # on a larger machine nothing would be needed; the choice stays
    assert train(recipe(*whole)).status == "finished"
    again = record(home)
    assert again["resumed"][0]["at_step"] == 1 and losses(home) == before
    assert again["choices"] == run["choices"] and [t["technique"] for t in again["techniques"]] == used
    assert (home / "plan.json").read_text() == plan
    assert train(load_recipe(home / "recipe.yaml")).status == "already finished"  # the resolved recipe is the same run


def test_what_is_asked_for_on_resume_goes_over_the_plans_choice():
    stored = {"train": {"micro_batch_size": 2}, "techniques": {"checkpointing": {"every": 1}, "lora": {"rank": 8}}}
    asked = {"memory": "auto", "train": {"micro_batch_size": None}, "techniques": {"checkpointing": {"every": 2}}}
    merged = with_free_keys(stored, asked)
    assert merged["techniques"] == {"checkpointing": {"every": 2}, "lora": {"rank": 8}}
    assert merged["train"]["micro_batch_size"] == 2
    merged = with_free_keys(stored, {**asked, "techniques": {}})
    assert merged["techniques"] == stored["techniques"]
    assert with_free_keys(stored, {**asked, "techniques": {}, "memory": None})["techniques"] == {"lora": {"rank": 8}}


def test_a_run_that_was_started_without_a_plan_is_another(recipe, tiny):
    tiny(1000)
    train(recipe("train.batch_size=2", "train.steps=1", "memory=null"))
    with pytest.raises(RunDirectoryError, match=r"another recipe: memory was None, now 'auto'"):
        train(recipe("train.batch_size=2", "train.steps=1"))


def test_nothing_fits(recipe, tiny, tmp_path, monkeypatch):
    tiny(1)
    monkeypatch.setattr(advice, "MOST_GPUS", 2)
    given = recipe("train.batch_size=1", "techniques.lora.rank=2", "techniques.checkpointing=true")
    with pytest.raises(MemoryExceededError) as error:
        train(given)
    text = str(error.value)
    assert text.startswith("Qwen3VLForConditionalGeneration in bf16-mixed needs ") and error.value.exit_code == 1
    assert " MiB on tiny, which has 1 MiB, with all that saves memory there (lora, checkpointing" in text
    assert "hint: it would fit with t4 in 16-mixed" in text
    home = tmp_path / "run"
    assert record(home, "plan.json")["verdict"] == "does not fit" and record(home)["status"] == "failed"
    assert list_checkpoints(home / "checkpoints") == []


def test_a_plan_that_came_to_nothing_is_not_left_behind(recipe, tiny, tmp_path):
    tiny(1000)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/plan.json").write_text("{}")
    train(recipe("train.batch_size=2", "train.steps=1", "memory=null"))
    assert not (tmp_path / "run/plan.json").exists()


def test_memory_takes_auto_exact_or_nothing(recipe):
    with pytest.raises(ConfigError, match=r"memory='plan'"):
        recipe("memory=plan")
    assert recipe("memory=null").memory is None


def test_an_exact_plan_leaves_the_numbers_as_they_are(recipe, tiny):
    tiny(1)
    found = plan_recipe(workload_of(recipe("train.batch_size=1", "memory=exact")), advice=False)
    reasons = {rejected.name: rejected.reason for rejected in found.rejected}
    assert reasons["low_bit_optimizer"] == "changes the numbers (8-bit moments: updates differ slightly)"
    assert "low_bit_optimizer" in str(plan_recipe(workload_of(recipe("train.batch_size=1")), advice=False).techniques)


def test_a_technique_that_is_set_to_false_is_not_in_the_plan(recipe, tiny):
    tiny(1)
    without = [f"techniques.{name}=false" for name in ("checkpointing", "accumulation", "batching", "packing")]
    given = recipe("train.batch_size=4", *without)
    assert given.used == {} and given.left_out == ("checkpointing", "accumulation", "batching", "packing")
    assert not decides_cut(given)
    found = plan_recipe(workload_of(given), advice=False)
    assert found.estimate.micro_batches == 1 and "checkpointing" not in str(found.techniques)
    assert {r.name: r.reason for r in found.rejected}["checkpointing"] == "excluded by you"


def test_what_is_left_out_of_a_plan_is_a_technique_and_is_not_written_into_the_run(recipe, tiny, tmp_path):
    with pytest.raises(ConfigError, match="there is no technique 'checkpoint'"):
        recipe("techniques.checkpoint=false")
    assert recipe("memory=null", "techniques.checkpointing=false").techniques == {}
    tiny(1000)
    small = ["train.batch_size=2", "train.steps=1", "techniques.checkpointing=false"]
    train(recipe(*small))
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["techniques"] == {}
    assert train(recipe(*small)).status == "already finished"

"""`floatline audit recipe.yaml`: the recipe's model, data, optimizer and precision are what is audited."""

import json

import pytest
import torch

from floatline.audit.command import AuditRequest
from floatline.errors import ConfigError
from floatline.plan.shape import Shape
from floatline.train.audit_recipe import audit_recipe, draw_batches, mode_of, rows_of
from floatline.train.data import load_samples
from floatline.train.parts import encoder_of
from floatline.train.recipe import load_recipe

QUICK = {"hardware": "t4", "repeats": 0, "probes": 0, "candidates": ("fp16",)}


def report(recipe_file, overrides=(), **options):
    request = AuditRequest(model=str(recipe_file), **(QUICK | options))
    return audit_recipe(request, ["train.batch_size=2", *overrides])


def test_a_recipe_is_audited_on_its_own_data_and_optimizer(recipe_file, digits) -> None:
    found = report(recipe_file, ["train.lr=1e-10"])
    assert found.model == "recipe" and found.hardware == "t4" and found.mode == "mixed"
    assert f"1 batch of 2 samples from {digits}/data/train.jsonl" in found.notes
    updates = found.updates["fp16"]
    assert updates.weights == "fp32" and "swallowed" in updates.failures and updates.rows[0].lr == 1e-10
    load_recipe(recipe_file, [f"precision={found.policy}"])
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_recipe_in_bf16_true_is_audited_with_cast_weights(recipe_file) -> None:
    found = report(recipe_file, ["precision=bf16-true", "train.optimizer=kahan"], hardware="auto", candidates=("bf16",))
    assert found.mode == "true" and found.candidates["bf16"].base == "bf16-true"
    assert any("recipe's kahan keeps what rounding takes away" in note for note in found.notes)


def test_the_recipes_precision_need_not_be_legal_on_the_target(recipe_file) -> None:
    assert report(recipe_file, ["precision=bf16-mixed"], candidates=("bf16",)).candidates["bf16"].illegal


def test_only_what_learns_is_audited(recipe_file) -> None:
    found = report(recipe_file, ["techniques.lora=true", "techniques.checkpointing=true"])
    assert {row.name.rpartition(".lora_")[1] for row in found.updates["fp16"].rows} == {".lora_"}
    assert "left out of the audit: checkpointing" in found.notes


def test_several_batches(recipe_file) -> None:
    found = report(recipe_file, batches=2, repeats=1)
    assert found.notes[0].startswith("2 batches of 2 samples") and found.passes["exact"] == 2


def test_batches_do_not_repeat_samples_while_there_are_others(recipe_file) -> None:
    recipe = load_recipe(recipe_file)
    encoder = encoder_of(recipe)
    samples = load_samples(recipe.data.train, encoder=encoder, max_pixels=None, on_bad_sample="stop").good[:6]
    one, other = draw_batches(encoder, samples, 3, 2, seed=0)
    rows = {tuple(ids[mask.bool()].tolist()) for batch in (one, other)
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"])}  # fmt: skip
    assert len(rows) >= 4 and one["input_ids"].shape[0] == other["input_ids"].shape[0] == 3
    again = draw_batches(encoder, samples, 3, 2, seed=0)[0]
    assert torch.equal(one["input_ids"], again["input_ids"])
    assert len(draw_batches(encoder, samples[:2], 2, 3, seed=0)) == 3


def test_rows_of_one_forward(recipe_file) -> None:
    assert rows_of(load_recipe(recipe_file)) == 8
    assert rows_of(load_recipe(recipe_file, ["train.micro_batch_size=2"])) == 2
    assert rows_of(load_recipe(recipe_file, ["techniques.accumulation.micro_batches=4"])) == 2


def test_modes() -> None:
    assert [mode_of(p) for p in ("16-true", "bf16-mixed; a=32", "32-true", "fp8-mixed")] == [
        "true", "mixed", "mixed", "mixed"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [({"shape": Shape(seq=8)}, "a size"), ({"task": "ctc"}, "--task"), ({"lr": 1e-3}, "--lr"),
     ({"optimizer": "sgd"}, "--optimizer")],
)  # fmt: skip
def test_what_the_recipe_decides_is_no_option(recipe_file, options, named) -> None:
    with pytest.raises(ConfigError, match=f"{named} was given, but .* is a recipe") as caught:
        report(recipe_file, **options)
    assert "key=value" in caught.value.hint

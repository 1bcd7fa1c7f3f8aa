"""A checkpoint of adapters becomes an ordinary model directory."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from floatline.errors import CheckpointError, ConfigError, ModelError
from floatline.train import load_recipe, merge_checkpoint, train
from floatline.train.checkpoint import list_checkpoints
from floatline.train.hub import load_processor


@pytest.fixture
def checkpoint(recipe_file, tmp_path, request):
    """The last checkpoint of a short run; parameters are overrides of its recipe."""
    overrides = ["techniques.lora.rank=4", *getattr(request, "param", [])]
    few = ["train.steps=3", "train.lr=1e-2", "data.validation=null", "data.test=null"]
    train(load_recipe(recipe_file, [f"run.dir={tmp_path / 'run'}", *few, *overrides]))
    return list_checkpoints(tmp_path / "run/checkpoints")[-1]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 17)[None]).logits


@pytest.mark.parametrize(
    "checkpoint",
    [
        [],
        ["precision=fp8-mixed; model.language_model.layers=fp8"],
        ["techniques.lora.train_also=[model.visual.merger, '**.input_layernorm']", "techniques.lora.rslora=true"],
    ],
    ids=["adapters", "fp8", "train_also"],
    indirect=True,
)
def test_merged_is_a_model_with_the_same_outputs(checkpoint, digits, tmp_path):
    target = merge_checkpoint(checkpoint, tmp_path / "merged")
    base = AutoModelForImageTextToText.from_pretrained(digits / "model")
    start = logits(base).clone()
    expected = logits(peft.PeftModel.from_pretrained(base, checkpoint))
    merged = AutoModelForImageTextToText.from_pretrained(target)
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not torch.isclose(expected, start, rtol=1e-2).all()
    assert load_file(target / "model.safetensors").keys() == load_file(digits / "model/model.safetensors").keys()
    assert load_processor(str(target)).chat_template == load_processor(str(checkpoint)).chat_template


def test_the_format_is_the_base_models_or_as_asked(checkpoint, digits, tmp_path):
    half = tmp_path / "half"
    AutoModelForImageTextToText.from_pretrained(digits / "model", dtype=torch.bfloat16).save_pretrained(half)
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(half)}))
    for name, dtype, found in (("a", None, torch.bfloat16), ("b", "fp32", torch.float32)):
        saved = load_file(merge_checkpoint(checkpoint, tmp_path / name, dtype) / "model.safetensors")
        assert {value.dtype for value in saved.values()} == {found}


def test_a_merged_model_can_be_trained_on(checkpoint, recipe_file, tmp_path):
    merge_checkpoint(checkpoint, tmp_path / "merged")
    again = load_recipe(
        recipe_file, [f"model.path={tmp_path / 'merged'}", f"run.dir={tmp_path / 'b'}", "train.steps=1"]
    )
    assert train(again).status == "finished"


@pytest.mark.parametrize("checkpoint", [["techniques.lora.targets=[embed_tokens]"]], ids=["tied"], indirect=True)
def test_a_tied_weight_is_not_merged(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"embed_tokens cannot be merged: its weight is tied to .*lm_head.weight"):
        merge_checkpoint(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged(checkpoint, digits, tmp_path, monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"model holds no adapters .*\nhint: give a checkpoint of a run with lora"
    ):
        merge_checkpoint(digits / "model", tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"run is there already\nhint: name a new or an empty directory"):
        merge_checkpoint(checkpoint, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"dtype='bf17'\nhint: allowed: fp32, bf16, fp16"):
        merge_checkpoint(checkpoint, tmp_path / "merged", dtype="bf17")
    path = checkpoint / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match=r"is not at .*gone any more\nhint: put it back, or write its place"):
        merge_checkpoint(checkpoint, tmp_path / "merged")
    (tmp_path / "gone").mkdir()
    with pytest.raises(ModelError, match=r"no model can be loaded from .*gone"):
        merge_checkpoint(checkpoint, tmp_path / "merged")
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match=r"adapter_config.json names no base model\nhint: write it there"):
        merge_checkpoint(checkpoint, tmp_path / "merged")
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        merge_checkpoint(checkpoint, tmp_path / "merged")


def test_peft_missing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft, which is not installed\nhint: pip install"):
        merge_checkpoint(checkpoint, tmp_path / "merged")

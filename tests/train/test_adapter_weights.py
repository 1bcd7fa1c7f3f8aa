"""Runs with LoRA: checkpoints of adapters that others load, exact resume onto the base model, and what is refused."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

import floatline as fl
from floatline.errors import ConfigError, ModelError, RunDirectoryError
from floatline.train import load_recipe, train
from floatline.train.adapter_weights import AdapterWeights, base_of, make_weights
from floatline.train.checkpoint import find_fault, list_checkpoints, load_state
from floatline.train.hub import holds_adapter, load_processor, model_files
from floatline.train.weights import PlainWeights

LORA = "techniques.lora.rank=4"
ALSO = "techniques.lora.train_also=[model.visual.merger, '**.input_layernorm']"


@pytest.fixture
def run(recipe_file, tmp_path):
    """Train 6 updates with overrides; `run(name, ...)` uses and returns run directory `name`."""

    def start(name, *overrides):
        few = ["train.steps=6", "train.checkpoint_every=2", "train.keep_last=9", "eval.every=6", "eval.generate=false"]
        train(load_recipe(recipe_file, [f"run.dir={tmp_path / name}", *few, *overrides]))
        return tmp_path / name

    return start


def manifest(home):
    return json.loads((home / "run.json").read_text())


def cut_back(home, keep=1):
    """Put a finished run back to where only its first `keep` checkpoints existed."""
    for path in list_checkpoints(home / "checkpoints")[keep:]:
        shutil.rmtree(path)
    (home / "run.json").write_text(json.dumps(manifest(home) | {"status": "running"}))


def final_tests(home):
    found = map(json.loads, (home / "metrics.jsonl").read_text().splitlines())
    return [record for record in found if record.get("split") == "test"]


def same(one, other):
    """Whether two trees of tensors and plain values are equal bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 17)[None]).logits


@pytest.mark.parametrize("overrides", [(), (ALSO, "techniques.lora.rslora=true")], ids=["adapters", "train_also"])
def test_a_checkpoint_is_pefts_directory_and_loads_from_anywhere(run, digits, tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(digits)
    home = run("run", LORA, "model.path=model", *overrides)
    monkeypatch.chdir(tmp_path)
    for path in list_checkpoints(home / "checkpoints"):
        assert find_fault(path) is None and holds_adapter(path)
        assert sum(file.stat().st_size for file in path.iterdir()) < (digits / "model/model.safetensors").stat().st_size
        assert load_processor(str(path)).chat_template
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 4, f"{digits / 'model'}")
    base = AutoModelForImageTextToText.from_pretrained(digits / "model")
    plain = logits(base).clone()
    by_peft = logits(peft.PeftModel.from_pretrained(base, path))
    assert not torch.isclose(by_peft, plain).all()
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(path)), by_peft)
    assert torch.equal(logits(peft.AutoPeftModel.from_pretrained(path)), by_peft)
    if overrides:
        saved, start = load_file(path / "adapter_model.safetensors"), load_file(digits / "model/model.safetensors")
        name = "model.visual.merger.linear_fc1.weight"
        assert not torch.equal(saved[f"base_model.model.{name}"], start[name])


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=32-true"],
        ["precision=bf16-mixed", "techniques.lora.dropout=0.2", ALSO],
        ["precision=bf16-mixed", "model.dtype=bf16", "techniques.lora.dropout=0.2"],
        ["precision=16-mixed", ALSO],
        ["precision=16-mixed", "model.dtype=fp16"],
        ["precision=bf16-true", ALSO],
        ["precision=16-true", "techniques.lora.rslora=true"],
        ["precision=bf16-mixed; lm_head=32"],
        ["techniques.freezing.modules=[model.visual]", "techniques.checkpointing=true"],
        ["techniques.lora.targets=[gate_proj, up_proj]", "techniques.low_bit_optimizer=true"],
        ["precision=bf16-true", "techniques.kahan=true"],
        ["techniques.optimizer_in_backward=true", "train.max_grad_norm=null"],
        ["techniques.packing=true", "techniques.chunked_loss=true"],
    ],
    ids=lambda overrides: " ".join(o.split(".")[-1].split("=", 1)[-1] for o in overrides),
)
def test_resume_is_exact(run, tmp_path, losses, overrides):
    whole = run("whole", LORA, *overrides)
    shutil.copytree(whole, tmp_path / "parts")
    cut_back(tmp_path / "parts")
    parts = run("parts", LORA, *overrides)
    assert manifest(parts)["resumed"][0]["at_step"] == 2 and len(losses(parts)) == 6
    assert losses(parts) == losses(whole)
    assert final_tests(parts)[0]["loss"] == final_tests(whole)[0]["loss"]
    one, other = (list_checkpoints(home / "checkpoints")[-1] for home in (parts, whole))
    assert same(*(load_file(path / "adapter_model.safetensors") for path in (one, other)))
    assert same(*(load_state(path)["step"] for path in (one, other)))


def test_a_half_precision_base_keeps_its_format_and_adapters_are_fp32(run, monkeypatch):
    from floatline.train import loop

    found = {}
    finish = loop.Loop._finish

    def look(self):
        found.update({name: (p.dtype, p.requires_grad) for name, p in self.step.model.named_parameters()})
        return finish(self)

    monkeypatch.setattr(loop.Loop, "_finish", look)
    home = run("run", LORA, "model.dtype=bf16")
    new = dict(found)
    cut_back(home), found.clear()
    run("run", LORA, "model.dtype=bf16")
    assert manifest(home)["resumed"] and found == new
    assert {value for name, value in found.items() if "lora_" in name} == {(torch.float32, True)}
    assert {value for name, value in found.items() if "lora_" not in name} == {(torch.bfloat16, False)}


def test_the_best_adapters_are_tested(run, monkeypatch):
    """A run whose best checkpoint is its first has the test loss of a run that ends there."""
    from floatline.train.best import Best

    note = Best.note
    monkeypatch.setattr(Best, "note", lambda self, found, done: done == 2 and note(self, found, done))
    often = [LORA, ALSO, "train.lr=0.1", "train.schedule=constant", "train.warmup_steps=0", "eval.every=2"]
    home, short = run("long", *often), run("short", *often, "train.steps=2")
    assert manifest(home)["result"]["best_step"] == 2 == final_tests(home)[0]["step"]
    assert final_tests(short)[0]["loss"] == final_tests(home)[0]["loss"]


def test_only_what_is_trained_is_counted_and_has_optimizer_state(run, digits):
    home = run("run", LORA, ALSO)
    path = list_checkpoints(home / "checkpoints")[-1]
    trained = load_file(path / "adapter_model.safetensors")
    size = sum(value.numel() for value in trained.values())
    noted = manifest(home)["parameters"]
    assert noted["trainable"] == size
    adapters = sum(value.numel() for key, value in trained.items() if ".lora_" in key)
    model = AutoModelForImageTextToText.from_pretrained(digits / "model")
    assert noted["total"] == adapters + sum(parameter.numel() for parameter in model.parameters())
    moments = load_state(path)["step"]["optimizer"]["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == size


def test_lora_settings_belong_to_the_run(run):
    home = run("run", LORA)
    with pytest.raises(RunDirectoryError, match=r"another recipe: techniques\.lora\.rank was 4, now 8\nhint: "):
        run("run", "techniques.lora.rank=8")
    with pytest.raises(
        RunDirectoryError, match=r"another recipe: techniques\.lora\.targets was \[\], now \['q_proj'\]"
    ):
        run("run", LORA, "techniques.lora.targets=[q_proj]")
    with pytest.raises(RunDirectoryError, match=r"another recipe: techniques\.lora\."):
        run("run")
    assert manifest(home)["status"] == "finished"


def test_another_base_model_is_refused(run, digits, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(digits / "model", model)
    home = run("run", LORA, f"model.path={model}")
    before = manifest(home)["base"]
    assert before["path"] == str(model) and set(before["sha256"]) == {"config.json", "model.safetensors"}
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    cut_back(home)
    with pytest.raises(RunDirectoryError) as error:
        run("run", LORA, f"model.path={model}")
    assert f"the base model {model} has changed since this run began (model.safetensors)" in error.value.message
    assert "run.json under base" in error.value.hint and manifest(home)["base"] == before
    shutil.rmtree(home / "checkpoints")  # nothing is left that belongs to the old one
    run("run", LORA, f"model.path={model}")
    assert manifest(home)["base"]["sha256"] != before["sha256"]


def test_files_of_a_model(tmp_path):
    for name in ("config.json", "a.safetensors", "b.safetensors", "model.safetensors.index.json", "old.bin", "x.txt"):
        (tmp_path / name).write_text("{}")
    names = [path.name for path in model_files(str(tmp_path))]
    assert names == ["config.json", "a.safetensors", "b.safetensors", "model.safetensors.index.json"]
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    assert [path.name for path in model_files(str(tmp_path))] == ["config.json", "old.bin"]


def test_adapters_are_no_model_to_train(run, digits):
    home = run("run", LORA)
    path = list_checkpoints(home / "checkpoints")[-1]
    with pytest.raises(ModelError, match=r"holds adapters, not a whole model\nhint: merge them .*merge_checkpoint"):
        run("next", f"model.path={path}")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.fc(x)).square().mean()


def weights_of(*techniques):
    step = fl.TrainStep(Net(), torch.optim.AdamW, precision="32-true", techniques=techniques)
    return make_weights(step, None, lambda path: Net())


def test_statistics_that_adapters_do_not_hold_are_refused():
    with pytest.raises(ConfigError) as error:
        weights_of("lora(targets=['fc'])")
    assert "norm is a batch norm whose running statistics change in training" in str(error.value)
    assert "lora.train_also, or in techniques.freezing.modules: norm" in error.value.hint
    with pytest.raises(ConfigError, match="norm is a batch norm"):
        weights_of("lora(targets=['fc'])", "freezing(modules=['norm'], batch_norm='train')")
    assert type(weights_of("lora(targets=['fc'])", "freezing(modules=['norm'])")) is AdapterWeights
    assert type(weights_of("lora(targets=['fc'], train_also=['norm'])")) is AdapterWeights
    assert type(weights_of("freezing(modules=['norm'])")) is PlainWeights


def test_a_base_model_is_a_directory_or_a_hub_id(tmp_path, monkeypatch):
    model = nn.Module()
    assert base_of(model) == ""
    model.config = peft.LoraConfig()
    model.config._name_or_path = "org/name"
    assert base_of(model) == "org/name"
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_of(model) == str(tmp_path / "org/name")

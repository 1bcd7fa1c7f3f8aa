"""LoRA: peft's maths and format, on and off without a trace."""

import copy
import json

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import CheckpointError, ConfigError, FloatlineWarning, PrecisionError
from floatline.techniques.adapters.state import adapter_state, load_adapter, merge, plain_state_dict, save_adapter
from floatline.techniques.lora import Lora

ADAPTABLE = ["mlp", "gpt2", "qwen3_vl", "tied"]


def sgd(params):
    return torch.optim.SGD(params, lr=0.5)


def adam(params):
    return torch.optim.AdamW(params, lr=1e-2)


def loss_of(case, model, seed=0):
    if case.loss is not None:
        return case.loss(model, case.batch(seed))
    output = model(**case.batch(seed))
    return output["loss"]


def trained(case, technique, updates=3, precision="32-true", model=None):
    model = model or case.build()
    step = fl.TrainStep(model, adam, precision=precision, loss=case.loss, techniques=[technique])
    for seed in range(updates):
        assert step(case.batch(seed)).applied
    return model, step


@pytest.fixture(params=ADAPTABLE)
def case(request, zoo):
    return zoo[request.param]


def test_starts_as_the_base_model_bit_for_bit(case):
    plain, model = case.build(), case.build()
    Lora(rank=4, rslora=True).apply(model)
    assert torch.equal(loss_of(case, model), loss_of(case, plain))


def test_only_adapters_learn_and_they_are_few(case):
    start = case.build()
    model, step = trained(case, Lora(rank=2))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert step.stack.facts()["lora.parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(torch.equal(value, start.state_dict()[name]) for name, value in plain_state_dict(model).items())
    assert all(bool((p != 0).any()) for name, p in model.named_parameters() if ".lora_B." in name)  # B was 0


def test_undo_leaves_no_trace(case):
    model = case.build()
    next(model.parameters()).requires_grad_(False)
    before = {
        n: (m, dict(m.__dict__), {k: p.requires_grad for k, p in m.named_parameters()})
        for n, m in model.named_modules()
    }
    applied = Lora(dropout=0.5).apply(model)
    applied.undo()
    after = {
        n: (m, dict(m.__dict__), {k: p.requires_grad for k, p in m.named_parameters()})
        for n, m in model.named_modules()
    }
    assert after == before
    assert torch.equal(loss_of(case, model), loss_of(case, case.build()))
    Lora().apply(model)  # and on again


def test_deepcopy_is_its_own(case):
    model = case.build()
    Lora(rank=2).apply(model)
    twin = copy.deepcopy(model)
    loss_of(case, twin).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter.zero_()
    twin.load_state_dict(case.build().state_dict())  # its hooks are its own too
    assert torch.equal(loss_of(case, twin), loss_of(case, model))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen3_vl"])
def test_the_same_as_peft(zoo, name, rslora):
    """peft's own model, trained by the same step."""
    import peft

    case = zoo[name]
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=rslora, target_modules=targets,
                             fan_in_fan_out=name == "gpt2")  # fmt: skip
    reference = peft.get_peft_model(case.build(), config)  # building seeds
    applied_to = case.build()
    Lora(targets=tuple(targets), rank=4, dropout=0.1, rslora=rslora).apply(applied_to)
    own = {n: p for n, p in applied_to.named_parameters() if p.requires_grad}
    for (key, parameter), mine in zip(
        ((k, p) for k, p in reference.named_parameters() if p.requires_grad), own.values(), strict=True
    ):
        assert torch.equal(parameter, mine), key  # drawn in the same order from the same seed
    outs = []
    for model in (reference, applied_to):
        torch.manual_seed(11)
        step = fl.TrainStep(model, adam, precision="32-true", loss=case.loss)
        outs.append([step(case.batch(seed)).loss for seed in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    theirs_now = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(theirs_now, own.values(), strict=True))


def test_targets_are_patterns_or_last_names(zoo):
    def touched(*targets, name="qwen3_vl"):
        model = zoo[name].build()
        applied = Lora(targets=targets).apply(model)
        applied.undo()
        return applied.touched

    text = "model.language_model.layers"
    assert touched("q_proj") == (f"{text}.0.self_attn.q_proj", f"{text}.1.self_attn.q_proj")
    assert touched(f"{text}.1.mlp.*_proj") == tuple(f"{text}.1.mlp.{k}_proj" for k in ("gate", "up", "down"))
    assert touched("*.1.conv", "conv", name="conv")[-1] == "blocks.2.conv"
    assert touched("embed_tokens") == ("model.language_model.embed_tokens",)


def test_a_name_is_the_whole_name_and_not_an_ending():
    model = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "fc": nn.Linear(2, 2)})
    model["b"] = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    assert Lora(targets=("a.fc",)).apply(model).touched == ("a.fc",)


@pytest.mark.parametrize(("precision", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_adapters_are_fp32_over_a_half_precision_base(zoo, precision, dtype):
    """Loaded in half precision and trained with a loss scale: "Attempting to unscale FP16 gradients" cannot come up."""
    case = zoo["gpt2"]
    model, step = trained(case, Lora(rank=2), precision=precision, model=case.build().to(dtype))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
    assert all(p.dtype == torch.float32 for group in step.optimizer.param_groups for p in group["params"])


def test_half_precision_weights_that_train_also_are_refused_with_a_loss_scale(zoo):
    case = zoo["gpt2"]
    with pytest.raises(PrecisionError, match=r"trainable torch.float16 weights .*GradScaler cannot unscale fp16"):
        trained(case, Lora(train_also=("transformer.ln_f",)), precision="16-mixed", model=case.build().half())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_true_policies_cast_adapters_like_all_weights(zoo, precision):
    model, _ = trained(zoo["gpt2"], Lora(rank=2), precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {
        torch.bfloat16 if precision == "bf16-true" else torch.float16
    }


def test_evaluation_uses_the_adapters(case):
    """The fused path of nn.TransformerEncoderLayer reads weights without calling their layers."""
    model, _ = trained(case, Lora(rank=2))
    with torch.no_grad():
        training = loss_of(case, model)
        torch.testing.assert_close(loss_of(case, model.eval()), training)
        assert not torch.isclose(training, loss_of(case, case.build()))


def test_adapters_made_on_a_model_in_evaluation_are_in_evaluation(zoo):
    model = zoo["gpt2"].build().eval()
    Lora(dropout=0.9).apply(model)
    assert not any(module.training for module in model.modules())


def test_a_plain_state_dict_loads_into_the_adapted_model_and_back(case):
    model, _ = trained(case, Lora(rank=2))
    adapters = {key: value.clone() for key, value in adapter_state(model).items()}
    other = case.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(value, adapters[key]) for key, value in adapter_state(model).items())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in plain_state_dict(model).items())
    back = case.build()
    back.load_state_dict(plain_state_dict(model))
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), other.parameters(), strict=True))
    again = case.build()
    Lora(rank=2).apply(again)
    again.load_state_dict(model.state_dict())  # its own, whole
    assert torch.equal(loss_of(case, again), loss_of(case, model))


def test_a_plain_state_dict_that_lacks_something_is_still_an_error(zoo):
    model = zoo["gpt2"].build()
    Lora(rank=2).apply(model)
    state = zoo["gpt2"].build().state_dict()
    del state["transformer.h.0.attn.c_attn.weight"]
    with pytest.raises(RuntimeError, match="c_attn"):
        model.load_state_dict(state)


@pytest.mark.parametrize("train_also", [(), ("**.ln_f",), ("**.ln_1.bias", "transformer.wpe")])
def test_saves_what_peft_loads(zoo, tmp_path, train_also):
    import peft

    case = zoo["gpt2"]
    model, _ = trained(case, Lora(rank=2, dropout=0.1, rslora=True, train_also=train_also))
    save_adapter(model, tmp_path, base="tiny-gpt2")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["use_rslora"]) == ("tiny-gpt2", 2, True)
    theirs = peft.PeftModel.from_pretrained(case.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(theirs(**case.batch(5)).logits, model.eval()(**case.batch(5)).logits)
    again = case.build()
    Lora(rank=2, dropout=0.1, rslora=True, train_also=train_also).apply(again)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**case.batch(5)).logits, model(**case.batch(5)).logits)


class Token(nn.Module):
    """A parameter of its own beside modules, as vision transformers have."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(4))
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.fc(x + self.token))


def test_a_parameter_beside_modules_is_saved_with_them(tmp_path):
    import peft

    def build():
        torch.manual_seed(0)
        return nn.Sequential(Token(), nn.Linear(4, 4))

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    model = build()
    step = fl.TrainStep(
        model,
        sgd,
        precision="32-true",
        loss=lambda m, batch: m(batch).square().mean(),
        techniques=[Lora(targets=("1",), train_also=("0",), rank=2)],
    )
    for _ in range(3):
        step(x)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["0"]
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(theirs(x), model(x)) and not torch.equal(model(x), build()(x))
    with pytest.raises(ConfigError, match=r"names 0.token, but peft's format keeps 0 whole or not at all, and 0.fc in"):
        Lora(targets=("0.fc",), train_also=("0.token",)).apply(build())


def test_an_adapter_that_does_not_fit(zoo, tmp_path):
    model = zoo["gpt2"].build()
    Lora(rank=2).apply(model)
    save_adapter(model, tmp_path)
    other = zoo["gpt2"].build()
    applied = Lora(rank=3).apply(other)
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \(2, 16\), in the model \(3, 16\)\nhint: .* the rank"):
        load_adapter(other, tmp_path)
    applied.undo()
    Lora(rank=2, targets=("c_fc",)).apply(other)
    with pytest.raises(
        CheckpointError, match=r"tensors are only in one of file and model, first base_model.model.transf"
    ):
        load_adapter(other, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no adapter_model.safetensors"):
        load_adapter(other, tmp_path / "nothing")


def test_merged_weights_give_the_same_outputs(case):
    model, step = trained(case, Lora(rank=2))
    expected = loss_of(case, model, 5).detach()
    plain = case.build()
    plain.load_state_dict(plain_state_dict(model, merged=True))
    torch.testing.assert_close(loss_of(case, plain, 5), expected)
    merge(model)
    torch.testing.assert_close(loss_of(case, model, 5), expected)
    step.undo()
    torch.testing.assert_close(loss_of(case, model, 5), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_tied_weight_is_not_merged(zoo):
    model, _ = trained(zoo["tied"], Lora(targets=("head",)))
    assert adapter_state(model)
    for attempt in (merge, lambda model: plain_state_dict(model, merged=True)):
        with pytest.raises(ConfigError, match=r"adapter of head cannot be merged: its weight is tied to embed.weight"):
            attempt(model)


def test_the_optimizer_must_be_a_factory(zoo):
    model = zoo["gpt2"].build()
    with pytest.raises(
        ConfigError, match=r"12 parameters that a technique added .*\nhint: pass optimizer=lambda params"
    ):
        fl.TrainStep(model, sgd(model.parameters()), precision="32-true", techniques=[Lora()])


def test_train_also_trains_and_is_part_of_the_adapter(zoo):
    case = zoo["qwen3_vl"]
    model, _ = trained(case, Lora(targets=("q_proj",), train_also=("model.visual.merger", "**.input_layernorm")))
    start = case.build().state_dict()
    moved = {name for name, value in plain_state_dict(model).items() if not torch.equal(value, start[name])}
    assert moved and all("merger." in name or "input_layernorm" in name for name in moved)
    assert "base_model.model.model.visual.merger.norm.weight" in adapter_state(model)


def test_bad_input(zoo):
    model = zoo["qwen3_vl"].build()
    wrong = r"'q_porj' matches no layer of Qwen3VLForConditionalGeneration\nhint: near names: .*self_attn.q_proj"
    with pytest.raises(ConfigError, match=wrong):
        Lora(targets=("q_porj",)).apply(model)
    container = (
        r"'self_attn' names no layer that can be adapted .*, but Qwen3VLTextAttention\nhint: near names: .*q_proj"
    )
    with pytest.raises(ConfigError, match=container):
        Lora(targets=("self_attn",)).apply(model)
    with pytest.raises(ConfigError, match=r"lora.train_also: 'model.visual.mergr' matches no .*\nhint: near .*merger"):
        Lora(train_also=("model.visual.mergr",)).apply(model)
    with pytest.raises(ConfigError, match=r"lora.train_also names .*q_proj.weight, which is in a layer that gets an"):
        Lora(targets=("q_proj",), train_also=("**.q_proj",)).apply(model)
    tied = r"lora.train_also names transformer.wte.weight, which is tied to lm_head.weight: .*\nhint: .*lora.targets"
    with pytest.raises(ConfigError, match=tied):
        Lora(train_also=("transformer.wte",)).apply(zoo["gpt2"].build())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not hasattr(model, "peft_config")
    for settings, message in (
        ({"rank": 0}, r"lora.rank is 0\nhint: give 1 or more"),
        ({"alpha": 0.0}, r"lora.alpha is 0.0\nhint: give a positive number"),
        ({"dropout": 1.0}, r"lora.dropout is 1.0\nhint: give 0 or more and less than 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Lora(**settings)
    with pytest.raises(
        ConfigError, match=r"names no layer that can be adapted .*, but NonDynamicallyQuantizableLinear"
    ):
        Lora(targets=("layers.*.self_attn.out_proj",)).apply(zoo["tied"].build())  # read without being called
    with pytest.raises(ConfigError, match="has no adapters"):
        merge(model)
    Lora(targets=("q_proj",)).apply(model)
    del model._floatline_techniques
    with pytest.raises(ConfigError, match="carries adapters of peft already"):
        Lora().apply(model)


def test_nothing_to_adapt_warns_and_freezes_nothing(zoo):
    model = zoo["conv"].build()
    with pytest.warns(FloatlineWarning, match=r"lora touched nothing: .* set targets"):
        Lora().apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_peft_missing(zoo, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    model = zoo["gpt2"].build()
    with pytest.raises(
        ConfigError, match=r'lora needs peft, which is not installed\nhint: pip install "floatline\[techn'
    ):
        Lora().apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2))


def test_mamba_layers_that_are_never_called_are_left_out():
    """Its kernels read the weights of out_proj and conv1d; peft refuses them, the usual targets go round them."""
    touched = Lora(rank=2).apply(mamba()).touched
    assert touched and not any(name.endswith(("out_proj", "conv1d")) for name in touched)
    with pytest.raises(ConfigError, match=r"'out_proj' names no layer that can be adapted .*\nhint: near names: "):
        Lora(rank=2, targets=("out_proj",)).apply(mamba())


def test_what_peft_refuses_is_one_error_and_leaves_no_trace(zoo, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("not this one")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    model = zoo["gpt2"].build()
    with pytest.raises(ConfigError, match=r"peft cannot adapt these layers: not this one\nhint: set lora.targets"):
        Lora(rank=2).apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not hasattr(model, "peft_config")


def test_what_no_adapter_can_be(zoo):
    with pytest.raises(ConfigError, match=r"lora.alpha is inf\nhint: give a positive number"):
        Lora(alpha=float("inf"))
    with pytest.raises(ConfigError, match=r"peft cannot adapt these layers: .*\n?"):
        Lora(rank=10**30).apply(zoo["gpt2"].build())


def test_one_pattern_may_be_a_text(zoo):
    assert Lora(targets="c_attn") == Lora(targets=["c_attn"])

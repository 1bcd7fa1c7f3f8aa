"""Attention: the kernel that the hardware can run is the one that runs, forward and backward, and the rest says why."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning
from floatline.hardware import lookup, resolve
from floatline.techniques import attention, attention_hf

Attention = fl.techniques.Attention
CPU = resolve("cpu")
FLASH, MATH = "_scaled_dot_product_flash_attention_for_cpu", "_safe_softmax"
KERNELS = ("auto", "flash", "efficient", "cudnn", "math", "flash-attn-2", "flash-attn-3", "flex")


class Recorder(TorchDispatchMode):
    """Counts the operations of forward and backward."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def ops_of(applied, forward):
    with Recorder() as recorder, applied.during():
        loss = forward()
        loss.backward()
    return recorder.ops, loss.detach()


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "sdpa"}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **settings}))


@pytest.mark.parametrize("name", ["gpt2", "qwen3_vl", "tied"])
def test_the_kernel_asked_for_runs(zoo, name):
    case = zoo[name]
    losses = {}
    for kernel in ("flash", "math"):
        model = case.build()
        applied = Attention(kernel=kernel).apply(model, CPU)
        ops, losses[kernel] = ops_of(applied, lambda model=model: model(**case.batch(0))["loss"])
        calls = ops[FLASH] if kernel == "flash" else ops[MATH]
        assert calls >= len(applied.touched) > 0
        assert not (ops[MATH] if kernel == "flash" else ops[FLASH])
    torch.testing.assert_close(losses["flash"], losses["math"], rtol=1e-6, atol=1e-6)


def test_recomputation_in_the_backward_meets_the_same_kernel(zoo):
    model = zoo["tied"].build()
    layer = model.layers[0]
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    applied = Attention(kernel="math").apply(model, CPU)
    ops, _ = ops_of(applied, lambda: checkpoint(layer, hidden, use_reentrant=False).sum())
    assert ops[MATH] == 2 and ops[FLASH] == 0


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 2e-2), ("16-mixed", 2e-3)])
def test_training_is_the_same_to_rounding(zoo, precision, tolerance):
    def losses(case, techniques):
        model = case.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = fl.TrainStep(model, optimizer, precision=precision, techniques=techniques)
        return torch.stack([step(case.batch(seed)).loss.float() for seed in range(3)])

    for name in ("gpt2", "qwen3_vl", "tied"):
        plain = losses(zoo[name], [])
        for techniques in (["attention"], ["attention(kernel='math')"], ["attention", "accumulation(micro_batches=2)"]):
            torch.testing.assert_close(losses(zoo[name], techniques), plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("hardware", "kernel", "note"),
    [
        ("t4", "efficient", "auto -> efficient: t4 is Turing, capability 7.5; flash attention kernels start at 8.0"),
        ("v100", "efficient", "auto -> efficient: v100-16gb is Volta, capability 7.0; flash attention kernels start"),
        ("a100", "flash", "auto -> flash: a100-40gb is Ampere, capability 8.0: flash attention kernels start at 8.0"),
        ("h200", "flash", "auto -> flash: h200 is Hopper, capability 9.0: flash attention kernels start at 8.0"),
        ("cpu", "flash", "auto -> flash: flash attention has a CPU kernel in torch"),
    ],
)
def test_auto_chooses_by_hardware_and_says_why(zoo, hardware, kernel, note):
    assert attention.sdpa_choice("auto", resolve(hardware))[0] == kernel
    applied = Attention().apply(zoo["gpt2"].build(), resolve(hardware))
    assert applied.notes[0].startswith(note)
    has_format_note = any("calls in fp32 (32-true, islands) take the efficient kernel" in n for n in applied.notes)
    assert has_format_note == (hardware in ("a100", "h200"))


@pytest.mark.parametrize(
    ("hardware", "kernel", "order"),
    [
        ("t4", "auto", ["EFFICIENT_ATTENTION", "MATH"]),
        ("t4", "flash", ["EFFICIENT_ATTENTION", "MATH"]),
        ("a100", "auto", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]),
        ("a100", "efficient", ["EFFICIENT_ATTENTION", "FLASH_ATTENTION", "MATH"]),
        ("h200", "cudnn", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]),
        ("h200", "math", ["MATH"]),
    ],
)
def test_the_order_is_torchs_setting_in_the_step_only(zoo, hardware, kernel, order):
    before = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    applied = Attention(kernel=kernel).apply(zoo["tied"].build(), lookup(hardware))
    with applied.during():
        now = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)
    assert now == [getattr(SDPBackend, name) for name in order]
    assert torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize(
    ("kernel", "hardware", "note"),
    [
        (
            "flash-attn-2",
            "t4",
            "flash-attn-2 -> efficient: t4 is Turing, capability 7.5; flash-attn-2 attention kernels ",
        ),
        ("flash", "t4", "flash -> efficient: t4 is Turing, capability 7.5; flash attention kernels start at 8.0"),
        ("flex", "v100", "flex -> efficient: v100-16gb is Volta, capability 7.0; flex attention kernels start at 8.0"),
        ("flash-attn-3", "b200", "flash-attn-3 -> flash: b200 is Blackwell; flash-attn-3 is built for Hopper only"),
        ("efficient", "cpu", "efficient -> flash: efficient attention has no CPU kernel in torch"),
        ("cudnn", "cpu", "cudnn -> flash: cudnn attention has no CPU kernel in torch"),
        ("flex", "cpu", "flex -> flash: FlexAttention has no backward on CPU"),
        ("flex", "a100", "flex -> flash: GPT2LMHeadModel keeps sdpa: GPT2LMHeadModel does not support"),
    ],
)
def test_fallbacks_carry_their_reason(zoo, kernel, hardware, note):
    assert Attention(kernel=kernel).apply(zoo["gpt2"].build(), resolve(hardware)).notes[0].startswith(note)


def test_packages_that_are_missing_are_named(zoo, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    notes = Attention(kernel="flash-attn-3").apply(zoo["gpt2"].build(), lookup("h200")).notes
    assert notes[0].startswith(
        "flash-attn-3 -> flash: flash_attn_3 is not installed (pip install kernels); flash_attn is"
    )
    plain = Attention(kernel="flash-attn-2").apply(zoo["tied"].build(), lookup("a100")).notes
    assert "flash-attn-2 is set through Hugging Face models, TiedLanguageModel holds none" in plain[0]


def test_a_package_that_cannot_be_used_falls_back(zoo, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    model = zoo["gpt2"].build()
    applied = Attention(kernel="flash-attn-2").apply(model, lookup("a100"))
    assert applied.notes[0].startswith("flash-attn-2 -> flash: GPT2LMHeadModel keeps sdpa: ")
    assert attention_hf.implementations(model) == {"sdpa"}


def test_fp32_and_the_flash_packages(monkeypatch):
    technique = Attention(kernel="flash-attn-2")
    assert technique.refuses(fl.Policy.parse("32-true"), 1.0) is None  # nothing there to fail: it falls back
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "detect", lambda: lookup("a100"))
    assert "not 32-true's fp32; use bf16-mixed" in technique.refuses(fl.Policy.parse("32-true"), 1.0)
    assert technique.refuses(fl.Policy.parse("bf16-mixed"), 1.0) is None
    assert Attention(kernel="flash").refuses(fl.Policy.parse("32-true"), 1.0) is None


def test_eager_models_are_switched_and_restored(zoo):
    case = zoo["qwen3_vl"]
    model = case.build()
    model.set_attn_implementation("eager")
    eager = model(**case.batch(0))["loss"].detach()
    before = [(id(config), name) for config, name in attention_hf.snapshot(model)]
    applied = Attention().apply(model, CPU)
    assert attention_hf.implementations(model) == {"sdpa"}
    assert "Qwen3VLForConditionalGeneration: eager -> sdpa" in applied.notes
    ops, loss = ops_of(applied, lambda: model(**case.batch(0))["loss"])
    assert ops[FLASH] and not ops[MATH]
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=1e-5)
    applied.undo()
    assert [(id(config), name) for config, name in attention_hf.snapshot(model)] == before


def test_parts_with_other_implementations_come_back_as_they_were(zoo):
    model = zoo["qwen3_vl"].build()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before = attention_hf.snapshot(model)
    applied = Attention(kernel="math").apply(model, CPU)
    twin = copy.deepcopy(model)
    assert attention_hf.implementations(model) == attention_hf.implementations(twin) == {"sdpa"}
    applied.undo()
    assert attention_hf.snapshot(model) == before
    assert attention_hf.implementations(model) == {"eager", "sdpa"}
    assert attention_hf.implementations(twin) == {"sdpa"}


def test_a_tower_alone_takes_what_the_whole_refuses(zoo, monkeypatch):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    monkeypatch.setattr(Qwen3VLTextModel, "_supports_flex_attn", True)
    model = zoo["qwen3_vl"].build()
    applied = Attention(kernel="flex").apply(model, lookup("a100"))
    assert model.config.text_config._attn_implementation == "flex_attention"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert any(note.startswith("vision_config: ") and "does not support" in note for note in applied.notes)
    applied.undo()
    assert attention_hf.implementations(model) == {"sdpa"}


def test_flex_gives_the_same_numbers(monkeypatch):
    model, ids = llama().eval(), torch.arange(24).reshape(2, 12)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex says that it runs uncompiled
        plain = model(input_ids=ids, labels=ids, use_cache=False).loss
        applied = Attention(kernel="flex").apply(model, lookup("a100"))
        assert attention_hf.implementations(model) == {"flex_attention"}
        assert applied.notes == () and len(applied.touched) == 2
        monkeypatch.delattr(F, "scaled_dot_product_attention")
        with applied.during():
            flex = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(flex, plain, rtol=1e-5, atol=1e-5)


def test_flex_and_dropout():
    model = llama(attention_dropout=0.1)
    notes = Attention(kernel="flex").apply(model, lookup("a100")).notes
    assert notes[0] == "flex -> flash: FlexAttention has no dropout, the config asks for 0.1"
    assert attention_hf.implementations(model) == {"sdpa"}


def test_auto_keeps_a_kernel_that_was_loaded_where_it_runs():
    model = llama(attn_implementation="flex_attention")
    kept = Attention().apply(model, lookup("a100"))
    assert attention_hf.implementations(model) == {"flex_attention"}
    assert "LlamaForCausalLM was loaded with flex_attention, which is kept" in kept.notes
    kept.undo()
    switched = Attention().apply(model, lookup("t4"))
    assert attention_hf.implementations(model) == {"sdpa"}
    switched.undo()
    assert attention_hf.implementations(model) == {"flex_attention"}


def test_models_that_return_their_weights_stay_eager(zoo):
    model = llama(attn_implementation="eager", output_attentions=True)
    notes = Attention().apply(model, CPU).notes
    assert any("keeps eager: it is to return its attention weights" in note for note in notes)
    assert attention_hf.implementations(model) == {"eager"}


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def test_touched_are_the_attention_modules(zoo):
    assert Attention().apply(zoo["tied"].build(), CPU).touched == ("layers.0.self_attn", "layers.1.self_attn")
    assert Attention().apply(zoo["qwen3_vl"].build(), CPU).touched == (
        "model.visual.blocks.0.attn",
        "model.visual.blocks.1.attn",
        "model.language_model.layers.0.self_attn",
        "model.language_model.layers.1.self_attn",
    )
    assert Attention().apply(nn.Sequential(nn.Linear(8, 8), Own()), CPU).touched == ("1",)
    hidden_in_a_function = nn.Sequential()
    hidden_in_a_function.attn = nn.Identity()
    assert Attention().apply(hidden_in_a_function, CPU).touched == ("",)


def test_a_hugging_face_model_inside_of_another(zoo):
    inner = zoo["gpt2"].build()
    inner.set_attn_implementation("eager")
    outer = nn.Sequential()
    outer.language = inner
    applied = Attention().apply(outer, CPU)
    assert attention_hf.implementations(outer) == {"sdpa"} and applied.touched[0].startswith("language.transformer.h.0")
    applied.undo()
    assert attention_hf.implementations(outer) == {"eager"}


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_models_without_attention_warn(zoo, name):
    with pytest.warns(FloatlineWarning, match="touched nothing: .* seems to have no attention"):
        Attention().apply(zoo[name].build(), CPU)


@pytest.mark.parametrize("kernel", KERNELS)
def test_undo_is_exact(zoo, kernel):
    for name in ("gpt2", "qwen3_vl", "tied"):
        model = zoo[name].build()
        before = {key: dict(module.__dict__) for key, module in model.named_modules()}
        configs = [dict(config.__dict__) for config in attention_hf.configs_of(model)]
        Attention(kernel=kernel).apply(model, CPU).undo()
        assert {key: dict(module.__dict__) for key, module in model.named_modules()} == before
        assert [dict(config.__dict__) for config in attention_hf.configs_of(model)] == configs


def test_bad_input(zoo):
    with pytest.raises(ConfigError, match=r"attention.kernel is 'flashy'\nhint: allowed: auto, flash, efficient"):
        Attention(kernel="flashy")
    model = zoo["gpt2"].build()
    Attention().apply(model, CPU)
    with pytest.raises(ConfigError, match="attention is already applied to this GPT2LMHeadModel"):
        Attention(kernel="math").apply(model, CPU)

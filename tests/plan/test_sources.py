"""Sources: model and batch of every family agree in a real forward and backward; shapes vary and are refused."""

import pytest
import torch
from tiny_configs import CONFIGS, model_directory
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from floatline.errors import ConfigError
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.step import TrainStep
from floatline.step.batch import default_loss

KINDS = {
    "gpt2": "causal-lm", "llama": "causal-lm", "qwen3": "causal-lm", "mixtral": "causal-lm", "bloom": "causal-lm",
    "bert": "encoder", "roberta": "encoder", "modernbert": "encoder", "t5": "seq2seq", "bart": "seq2seq",
    "vit": "vision", "dinov2": "vision", "swin": "vision", "convnext": "vision", "resnet": "vision",
    "clip": "contrastive", "siglip": "contrastive", "whisper": "speech-seq2seq", "wav2vec2": "audio",
    "hubert": "audio",
    "qwen2_vl": "vision-language", "qwen2_5_vl": "vision-language", "qwen3_vl": "vision-language",
    "glm4v": "vision-language", "gemma3": "vision-language", "paligemma": "vision-language",
    "llava": "vision-language",
    "internvl": "vision-language", "idefics3": "vision-language", "smolvlm": "vision-language",
}  # fmt: skip
SIZES = {"causal-lm": {"seq": 12}, "encoder": {"seq": 12}, "seq2seq": {"seq": 12, "target": 7}, "vision": {},
         "contrastive": {}, "speech-seq2seq": {"target": 7}, "audio": {"seconds": 0.1},
                         "vision-language": {}}  # fmt: skip
IDLE = {"dinov2": {"dinov2.embeddings.mask_token"}, "whisper": {"model.encoder.embed_positions.weight"}}
"""Weights that training leaves without a gradient, by the model's own design."""


def tiny(tmp_path, name, **sizes):
    path = model_directory(tmp_path, name)
    return load_source(path, Shape(**{"batch": 2, **sizes}))


def loss_of(source):
    model, batch = source.work.build_model(), source.work.build_batch()
    return model, (source.work.loss or default_loss)(model, batch)


def test_every_tiny_family_is_covered():
    assert set(KINDS) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_and_batch_agree(tmp_path, name):
    source = tiny(tmp_path, name, **SIZES[KINDS[name]])
    model, loss = loss_of(source)
    loss.backward()
    assert source.kind == KINDS[name] and torch.isfinite(loss)
    idle = {key for key, weight in model.named_parameters() if weight.grad is None}
    if name == "llava":  # it reads the tower's last layer but one
        idle = {key for key in idle if not key.startswith("model.vision_tower")}
    assert idle == IDLE.get(name, set())
    assert source.parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "clip", "whisper", "wav2vec2", "qwen3_vl", "gemma3"])
def test_a_train_step_runs_on_the_workload(tmp_path, name):
    work = tiny(tmp_path, name, **SIZES[KINDS[name]]).work
    model = work.build_model()
    step = TrainStep(model, work.build_optimizer(model), "32-true", loss=work.loss)
    assert step(work.build_batch()).loss > 0


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gpt2", "sequence-classification"),
        ("bert", "sequence-classification"),
        ("bert", "token-classification"),
        ("bert", "question-answering"),
        ("bart", "sequence-classification"),
        ("t5", "sequence-classification"),
        ("wav2vec2", "audio-classification"),
    ],
)
def test_other_heads_train_too(tmp_path, name, task):
    sizes = {"seconds": 0.1} if name == "wav2vec2" else {"seq": 12}
    source = load_source(model_directory(tmp_path, name), Shape(batch=2, **sizes), task=task)
    loss_of(source)[1].backward()
    assert source.task == task


@pytest.mark.parametrize("name", CONFIGS)
def test_under_a_fake_mode_ids_stay_real_and_the_rest_is_fake(tmp_path, name):
    work = tiny(tmp_path, name, **SIZES[KINDS[name]]).work
    plain = work.build_batch()
    with FakeTensorMode():
        batch = work.build_batch()
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        key: tuple(v.shape) for key, v in plain.items()
    }
    for key, value in batch.items():
        assert isinstance(value, FakeTensor) == value.is_floating_point(), key
        assert value.dtype is plain[key].dtype
    assert all(torch.equal(value, plain[key]) for key, value in batch.items() if not value.is_floating_point())


def test_a_source_can_be_reshaped(tmp_path):
    source = tiny(tmp_path, "llama", seq=12)
    other = source.reshaped(Shape(batch=5, seq=40))
    assert other.work.build_batch()["input_ids"].shape == (5, 40)
    assert source.work.build_batch()["input_ids"].shape == (2, 12)
    assert other.reshaped(Shape()).shape == Shape(batch=1, seq=512)


def test_open_sizes_have_reasons_and_limits_are_told():
    source = load_source("gpt2")
    assert [str(choice) for choice in source.choices] == [
        "batch 1: the least; raise it when it fits",
        "seq 1024: the longest it takes (n_positions)",
    ]
    assert source.limits == {"seq": 1024}
    assert source.origin == "bundled description of openai-community/gpt2"


def test_a_sequence_over_the_limit_is_refused_learned_and_rotary():
    for name, limit, key in [("gpt2", 1024, "n_positions"), ("tinyllama-1.1b", 2048, "max_position_embeddings")]:
        with pytest.raises(ConfigError, match=rf"seq={limit + 1} is over the {limit} positions of {name} \({key}"):
            load_source(name, Shape(seq=limit + 1))


def test_sizes_of_other_kinds_are_refused():
    for name, sizes, said in [
        ("gpt2", {"image": (8, 8)}, "gpt2 takes no image"),
        ("gpt2", {"target": 8}, "gpt2 takes no target"),
        ("t5-small", {"seconds": 1.0}, "t5-small takes no seconds"),
        ("vit-base", {"seq": 8}, "vit-base takes no seq"),
        ("whisper-tiny", {"image": (8, 8)}, "whisper-tiny takes no image"),
        ("qwen3-vl-2b", {"seconds": 1.0}, "qwen3-vl-2b takes no seconds"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load_source(name, Shape(**sizes))


def test_a_function_brings_its_own_loss():
    with pytest.raises(ConfigError, match="brings its own loss"):
        load_source("module:function", task="causal-lm")

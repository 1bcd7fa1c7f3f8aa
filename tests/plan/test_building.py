"""Building: real weights for real, none under fake tensors, none on meta; tied weights stay tied everywhere."""

import resource

import pytest
import torch
from tiny_configs import CONFIGS, model_directory
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from floatline.errors import ModelError
from floatline.plan.bundled import bundled_names, describe
from floatline.plan.sources import load_source

READS_IN_ITS_CONSTRUCTOR = {"convnext", "convnext-base"}
"""ConvNext reads its drop-path rates back from a tensor, which a bare fake mode cannot answer."""


@pytest.mark.parametrize("name", sorted(set(bundled_names()) - READS_IN_ITS_CONSTRUCTOR))
def test_every_bundled_model_is_built_under_fake_tensors(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work = load_source(name).work
    with FakeTensorMode():
        model = work.build_model()
    weights = list(model.parameters())
    assert all(isinstance(weight, FakeTensor) for weight in weights)
    assert sum(weight.numel() for weight in weights) == describe(name).parameters  # so they are tied as for real
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; Llama 70B is 280 GB in fp32


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - READS_IN_ITS_CONSTRUCTOR))
def test_fake_and_real_models_have_the_same_tensors(tmp_path, name):
    work = load_source(model_directory(tmp_path, name)).work
    real = work.build_model()
    with FakeTensorMode():
        fake = work.build_model()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in fake.state_dict().items()} == shapes
    assert [name for name, _ in fake.named_parameters()] == [name for name, _ in real.named_parameters()]


def test_a_real_model_is_initialised_and_trains_without_a_cache(tmp_path):
    model = load_source(model_directory(tmp_path, "llama")).work.build_model()
    assert model.training and model.config.use_cache is False
    assert 0.01 < model.lm_head.weight.std() < 0.03


def test_a_config_that_cannot_be_built_is_a_clear_error(tmp_path):
    work = load_source(model_directory(tmp_path, "gpt2", activation_function="wobble")).work
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot be built from its config: .*wobble"):
        work.build_model()


def test_weights_beside_a_config_are_never_read(tmp_path):
    path = model_directory(tmp_path, "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"not weights")
    assert load_source(path).work.build_model() is not None


def test_no_layer_is_skipped_at_random_and_that_is_told(tmp_path):
    source = load_source(model_directory(tmp_path, "hubert", layerdrop=0.9))
    assert source.work.build_model().config.layerdrop == 0.0
    assert any("skipped at random" in note for note in source.notes)
    assert not load_source(model_directory(tmp_path, "llama")).notes[0].startswith("no layer")


def test_each_model_has_a_config_of_its_own(tmp_path):
    work = load_source(model_directory(tmp_path, "llama")).work
    first, second = work.build_model(), work.build_model()
    assert first.config is not second.config


def test_the_format_of_the_weights_can_be_asked_for(tmp_path):
    path = model_directory(tmp_path, "llama", dtype="bfloat16")
    assert load_source(path).work.build_model().dtype is torch.float32
    assert load_source(path, dtype=torch.bfloat16).work.build_model().dtype is torch.bfloat16
    assert load_source(path).dtype == "bfloat16"
    assert load_source(model_directory(tmp_path, "gpt2")).dtype is None


def test_attention_is_sdpa_where_the_model_supports_it(tmp_path):
    model = load_source(model_directory(tmp_path, "llama")).work.build_model()
    assert model.config._attn_implementation == "sdpa"

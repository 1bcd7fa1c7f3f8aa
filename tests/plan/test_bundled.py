"""Bundled descriptions: every one is built and has the number of parameters that is published."""

import json

import pytest

from floatline.plan.bundled import FOLDER, bundled_name, bundled_names, describe
from floatline.plan.sources import load_source

WELL_KNOWN = {
    "qwen3-vl-2b": 2_127_532_032,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "gpt2": 124_439_808,
    "bert-base": 109_514_298,
    "t5-small": 60_506_624,
    "whisper-tiny": 37_760_640,
}


@pytest.mark.parametrize("name", bundled_names())
def test_the_count_of_parameters_is_the_published_one(name):
    source = load_source(name)
    assert source.parameters == describe(name).parameters
    assert source.choices and all(choice.reason for choice in source.choices)


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_the_files_say_what_everybody_knows(name):
    assert describe(name).parameters == WELL_KNOWN[name]


@pytest.mark.parametrize("name", bundled_names())
def test_files_hold_facts_and_nothing_else(name):
    description = describe(name)
    assert description.hub.count("/") == 1
    assert description.parameters_from in ("published", "computed")
    assert {"model_type", "architectures"} <= set(description.config)
    assert name == name.lower()


def test_config_keys_are_known_to_their_class():
    """A misspelt key would be kept silently as an extra attribute and change nothing."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    usual = {"model_type", "architectures", "dtype", "num_labels", "rope_theta", "rope_scaling", "bos_token_id",
             "eos_token_id", "pad_token_id", "decoder_start_token_id", "head_dim", "global_attn_every_n_layers",
             "global_rope_theta",
             "local_rope_theta"}  # fmt: skip
    for name in bundled_names():
        tree = describe(name).config
        cls = CONFIG_MAPPING[tree["model_type"]]
        known = set(vars(cls())) | set(cls.attribute_map) | usual
        assert set(tree) - known == set(), name


def test_a_name_is_found_in_any_case_and_by_hub_id():
    assert bundled_name("Qwen3-VL-2B") == "qwen3-vl-2b"
    assert bundled_name("Qwen/Qwen3-VL-2B-Instruct") == "qwen3-vl-2b"
    assert bundled_name("qwen3-vl-3b") is None


def test_the_descriptions_are_packaged():
    import tomllib
    from pathlib import Path

    project = Path(__file__).parents[2] / "pyproject.toml"
    packaged = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["floatline"]
    assert "plan/architectures/*.json" in packaged
    assert all(isinstance(json.loads(path.read_text()), dict) for path in FOLDER.glob("*.json"))

"""Finding a config: places in their order, and a clear error for everything that is not a model."""

import json

import pytest
from tiny_configs import CONFIGS, model_directory

from floatline.errors import ConfigError, ModelError
from floatline.plan.configs import find_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(home, hub_id, files):
    """Lay out a hub cache as huggingface_hub does."""
    repo = home / f"models--{hub_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name, tree in files.items():
        (snapshot / name).write_text(json.dumps(tree))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    home = tmp_path / "cache"
    home.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    return home


def refused(text):
    with pytest.raises(ModelError) as caught:
        find_config(str(text))
    return caught.value


def test_a_directory_and_its_config_are_the_same_model(tmp_path):
    path = model_directory(tmp_path, "gpt2")
    for text in (path, f"{path}/config.json"):
        found = find_config(text)
        assert (found.name, found.config.n_embd, found.parameters) == ("gpt2", 32, None)


def test_a_saved_model_is_found(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tree = {key: value for key, value in CONFIGS["gpt2"].items() if key not in ("model_type", "architectures")}
    GPT2LMHeadModel(GPT2Config(**tree)).save_pretrained(tmp_path / "mine")
    found = find_config(str(tmp_path / "mine"))
    assert found.config.architectures == ["GPT2LMHeadModel"] and found.name == "mine"


def test_a_bundled_name_and_a_directory_that_shadows_it(tmp_path, monkeypatch):
    assert find_config("gpt2").parameters == 124_439_808
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()  # a folder of that name that is no model does not hide the bundled one
    assert find_config("gpt2").parameters == 124_439_808
    model_directory(tmp_path, "gpt2")
    assert find_config("gpt2").config.n_embd == 32


def test_a_hub_id_is_found_in_the_local_cache(cache):
    cached(cache, "me/small", {"config.json": CONFIGS["gpt2"]})
    found = find_config("me/small")
    assert (found.name, found.config.n_embd) == ("me/small", 32)


def test_the_cache_comes_before_the_bundled_description(cache):
    hub = "openai-community/gpt2"
    found = find_config(hub)
    assert found.parameters == 124_439_808 and "not in the local cache" in found.notes[0]
    cached(cache, hub, {"config.json": CONFIGS["gpt2"]})
    assert find_config(hub).config.n_embd == 32


def test_a_hub_id_that_is_not_cached_is_not_downloaded(cache, monkeypatch):
    import socket

    def no_network(*args, **kwargs):
        raise AssertionError("a plan must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    error = refused("me/absent")
    assert "not in the local Hugging Face cache" in error.message
    assert "hf download me/absent config.json" in error.hint


def test_adapters_point_to_their_base(tmp_path, cache):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "openai-community/gpt2"}
    cached(cache, "me/adapter", {"adapter_config.json": adapter})
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for text in ("me/adapter", folder, folder / "adapter_config.json"):
        error = refused(text)
        assert "adapters of openai-community/gpt2" in error.message
        assert error.hint == "plan its base model: openai-community/gpt2"


def test_what_is_not_a_model_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 16)
    (tmp_path / "notes.txt").write_text("a model")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"name": "x"}')
    (tmp_path / "empty").mkdir()
    for name, said, hint in [
        ("model.safetensors", "holds weights", "config.json beside it"),
        ("notes.txt", "is not JSON", "give a Hugging Face directory"),
        ("binary", "is not JSON", "give a Hugging Face directory"),
        ("list.json", "holds a list", "give a Hugging Face directory"),
        ("other.json", "has no model_type", "config.json of a Hugging Face model"),
        ("empty", "has no config.json", "give a Hugging Face directory"),
        ("missing.json", "no such file", "give a Hugging Face directory"),
        ("missing", "no such file", "give a Hugging Face directory"),
    ]:
        error = refused(tmp_path / name)
        assert said in error.message and hint in error.hint, name


def test_an_unknown_name_gets_the_nearest_bundled_ones():
    assert "qwen3-vl-2b" in refused("qwen3-vl2b").hint
    assert "bundled: " in refused("zzz").hint and "gpt2" in refused("zzz").hint


def test_a_text_that_is_no_hub_id_is_refused():
    assert "is no hub id" in refused("me/..bad--name").message


def test_an_unknown_type_names_the_version_of_transformers(tmp_path):
    import transformers

    path = tmp_path / "config.json"
    path.write_text('{"model_type": "warp9", "auto_map": {"AutoModel": "x.y"}}')
    error = refused(path)
    assert f"transformers {transformers.__version__} has no model_type 'warp9'" in error.message
    assert "code of its own" in error.message and "update transformers" in error.hint


def test_a_config_that_contradicts_itself_is_refused(tmp_path):
    error = refused(model_directory(tmp_path, "llama", hidden_size="wide"))
    assert "is no config of a llama" in error.message


def test_without_transformers_the_way_out_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="needs transformers, which is not installed") as caught:
        find_config("gpt2")
    assert 'pip install "floatline[train]"' in caught.value.hint


def test_a_quantised_checkpoint_is_told(tmp_path):
    path = model_directory(
        tmp_path, "llama", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )
    assert "quantised" in find_config(path).notes[0]


@pytest.mark.parametrize("nested", [False, True])
def test_facts_of_the_processor_are_read_from_either_file(tmp_path, nested):
    path = model_directory(tmp_path, "qwen3_vl")
    facts = {"min_pixels": 64}
    (tmp_path / "qwen3_vl" / "preprocessor_config.json").unlink()
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / "qwen3_vl" / name).write_text(json.dumps({"image_processor": facts} if nested else facts))
    assert find_config(path).processor == facts

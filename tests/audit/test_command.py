"""`AuditRequest` and `answer`: what is audited, what is refused, what a source's notes say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from floatline.audit.command import OPTIMIZERS, AuditRequest, answer, parse_probes
from floatline.audit.sources import RANDOM_BATCH, UNTRAINED, holds_weights, load_audit_source, small
from floatline.errors import ConfigError, ModelError
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.precision import Policy

MODELS = Path(__file__).parent / "audited_models.py"
SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}


def request(function: str, **options) -> AuditRequest:
    quick = {"hardware": "a100-40gb", "repeats": 0, "probes": 0, "candidates": ("bf16",)}
    return AuditRequest(model=f"{MODELS}:{function}", **(quick | options))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A directory with a GPT-2 of two layers, its weights far from initialised ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    home = tmp_path_factory.mktemp("audited") / "tiny"
    model = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))
    torch.nn.init.constant_(model.transformer.ln_f.bias, 0.25)
    model.save_pretrained(home)
    return home


def test_a_function_is_audited() -> None:
    told = []
    found = answer(request("healthy"), lambda what, done: told.append((what, done)))
    assert found.model == "healthy" and found.policy == "bf16-mixed" and found.safe
    assert told[0] == ("loading the model", 0) and ("the step in fp64", 3) in told
    assert told[-1][1] == found.forward_passes - 1


def test_what_fails_is_kept_in_fp32() -> None:
    found = answer(request("counting"))
    assert found.policy == "bf16-mixed; count=32"
    Policy.parse(found.policy)


def test_json_holds_plain_values_and_infinity_as_text() -> None:
    found = answer(request("overflowing", candidates=("fp16",)))
    assert not found.safe and found.policy == "32-true"
    tree = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert tree["candidates"]["fp16"]["all_lowered"]["loss_error"] == "inf"
    assert (
        tree["safe"] is False and tree["rows"][0]["failure"] == "range" and tree["rows"][0]["measure"]["ulps"] == "inf"
    )


def test_sizes_reach_the_function() -> None:
    assert load_audit_source(f"{MODELS}:healthy", Shape(batch=7)).batch[0].shape == (7, 8)
    with pytest.raises(ConfigError, match="has no parameter 'seq'"):
        load_audit_source(f"{MODELS}:healthy", Shape(seq=7))


def test_an_optimizer_is_asked_for_by_name() -> None:
    found = answer(request("healthy", optimizer="sgd", lr=1e-12))
    assert found.updates["bf16"].failures == {"swallowed": 4} and found.updates["bf16"].rows[0].lr == 1e-12
    assert answer(request("healthy")).updates == {}


def test_a_workloads_own_optimizer_is_audited() -> None:
    assert answer(request("own_optimizer")).updates["bf16"].rows[0].lr == 1e-12


def test_fp8_is_asked_for() -> None:
    found = answer(request("healthy", fp8=True))
    assert [row.name for row in found.fp8] == ["up", "down"] and found.fp8_policy == "fp8-mixed"
    assert json.loads(json.dumps(found.as_dict()))["fp8"][0]["verdict"]


def test_forward_only() -> None:
    found = answer(request("healthy", backward=False))
    assert {row.phase for row in found.rows} == {"forward"} and found.candidates["bf16"].all_lowered.gradient_error == 0


def test_a_directory_is_audited_with_its_weights(gpt2) -> None:
    source = load_audit_source(str(gpt2))
    assert source.model.transformer.ln_f.bias[0].item() == 0.25
    assert source.batch["input_ids"].shape == (2, 64)  # positions end there
    assert RANDOM_BATCH in source.notes and UNTRAINED not in source.notes
    assert not source.model.config.use_cache


def test_without_weights_the_model_is_random_and_the_notes_say_so(gpt2, tmp_path) -> None:
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    one, other = load_audit_source(str(tmp_path)), load_audit_source(str(tmp_path))
    assert UNTRAINED in one.notes
    assert torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)


def test_weights_that_are_not_in_the_checkpoint_are_named(gpt2) -> None:
    source = load_audit_source(str(gpt2), task="sequence-classification")
    assert any("1 weights are not in the checkpoint and are random, e.g. score.weight" in n for n in source.notes)


def test_damaged_weights_are_one_error(gpt2, tmp_path) -> None:
    (tmp_path / "config.json").write_text((gpt2 / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"the weights in .* cannot be loaded"):
        load_audit_source(str(tmp_path))


def test_a_quantised_checkpoint_is_refused(gpt2, tmp_path) -> None:
    tree = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**tree, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match="quantised: its weights are no floats"):
        load_audit_source(str(tmp_path))


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch) -> None:
    monkeypatch.setattr("floatline.audit.sources.available_memory", lambda: 8 * 2**30)
    with pytest.raises(ModelError, match=r"gpt2-xl has 1.56 G parameters: an audit holds at least 46 GiB"):
        load_audit_source("gpt2-xl")


def test_open_sizes_are_small_and_given_ones_are_kept(gpt2) -> None:
    assert load_audit_source(str(gpt2), Shape(seq=8, batch=3)).batch["input_ids"].shape == (3, 8)
    with pytest.raises(ConfigError, match="seq=65 is over the 64 positions"):
        load_audit_source(str(gpt2), Shape(seq=65))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen3-0.6b", Shape(batch=2, seq=128)),
        ("t5-small", Shape(batch=2, seq=128, target=64)),
        ("whisper-tiny", Shape(batch=2, target=64, seconds=2.0)),
        ("siglip-so400m", Shape(batch=2, seq=64, image=(384, 384))),  # it takes one size of image
    ],
)
def test_a_batch_is_as_small_as_the_model_takes_it(name, shape) -> None:
    assert small(load_source(name), Shape()).shape == shape


def test_where_so_few_tokens_do_not_hold_an_image_the_tokens_stay_open() -> None:
    found = small(load_source("smolvlm-256m"), Shape()).shape
    assert found.batch == 2 and found.image == (224, 224) and found.seq > 128
    found = small(load_source("wav2vec2-base"), Shape(batch=1)).shape
    assert found.batch == 1 and found.seconds == 2.0


def test_files_with_weights() -> None:
    names = ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "adapter_model.safetensors",
             "optimizer.bin", "training_args.bin", "config.json"]  # fmt: skip
    assert [holds_weights(Path(name)) for name in names] == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"candidates": ("bf61",)}, "unknown candidate 'bf61'", "bf16"),
        ({"mode": "mixd"}, "unknown mode 'mixd'", "mixed"),
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'", "adamw"),
        ({"lr": 0.0}, "--lr 0.0 is no learning rate", "above 0"),
        ({"repeats": -1}, "--repeats -1 is too few", "0 or more"),
        ({"most_trials": 0}, "--most-trials 0 is too few", "2 or more"),
        ({"backward": False, "fp8": True}, "--fp8 needs the backward", "leave out --fp8"),
        ({"backward": False, "lr": 1e-3}, "--lr needs the backward", "leave out --lr"),
        ({"tolerance": -1.0}, "tolerance=-1.0 is no positive number", "0.05"),
        ({"hardware": "t5"}, "unknown hardware 't5'", "t4"),
    ],
)
def test_options_that_cannot_be_are_refused_before_a_model_is_built(options, message, hint) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        AuditRequest(**({"model": "nowhere:nothing"} | options))
    assert hint in caught.value.hint


def test_several_batches_are_for_recipes() -> None:
    with pytest.raises(ConfigError, match="--batches 2 is for recipes"):
        answer(replace(request("healthy"), batches=2))


def test_probes_as_text() -> None:
    assert parse_probes(" all ") is None and parse_probes("3") == 3
    for text in ("some", "-1", "1.5"):
        with pytest.raises(ConfigError, match="is no number of modules"):
            parse_probes(text)


def test_every_optimizer_can_be_made() -> None:
    for name in OPTIMIZERS:
        made = AuditRequest(model="x", optimizer=name).make_optimizer
        assert made is not None
        assert made([torch.nn.Parameter(torch.ones(2, 2))]).param_groups[0]["lr"] == 1e-4
    assert AuditRequest(model="x").make_optimizer is None

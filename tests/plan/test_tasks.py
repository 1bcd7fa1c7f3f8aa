"""Tasks: the class a config names, the usual head where it names none that trains, and what is asked for."""

import pytest
import torch
from tiny_configs import CONFIGS, model_directory

from floatline.errors import ConfigError, ModelError
from floatline.plan.configs import find_config
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.plan.tasks import TASKS, _mapping, choose_training


def training(tmp_path, name, asked=None, **changes):
    return choose_training(find_config(model_directory(tmp_path, name, **changes)).config, asked, name)


def test_the_class_that_the_config_names_is_used_without_a_note(tmp_path):
    chosen = training(tmp_path, "bart")
    assert (chosen.task.name, chosen.cls.__name__, chosen.note) == ("seq2seq-lm", "BartForConditionalGeneration", "")
    assert training(tmp_path, "hubert").task.name == "audio-classification"


def test_a_bare_body_gets_the_usual_head_with_a_note(tmp_path):
    chosen = training(tmp_path, "qwen3")
    assert chosen.cls.__name__ == "Qwen3ForCausalLM"
    assert "names Qwen3Model, which has no loss" in chosen.note and "causal-lm" in chosen.note
    assert training(tmp_path, "bert").cls.__name__ == "BertForMaskedLM"
    assert training(tmp_path, "wav2vec2").cls.__name__ == "Wav2Vec2ForCTC"


def test_a_config_without_architectures_follows_its_type(tmp_path):
    assert training(tmp_path, "whisper", architectures=None).task.kind == "speech-seq2seq"
    assert training(tmp_path, "qwen3_vl", architectures=None).task.kind == "vision-language"
    assert training(tmp_path, "t5", architectures=None).task.kind == "seq2seq"


def test_a_decoder_of_an_encoder_type_is_causal(tmp_path):
    assert training(tmp_path, "bert", architectures=None, is_decoder=True).task.name == "causal-lm"


def test_a_task_can_be_asked_for(tmp_path):
    assert training(tmp_path, "gpt2", "sequence-classification").cls.__name__ == "GPT2ForSequenceClassification"


def test_an_unknown_task_and_one_without_head_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown task 'mased-lm'") as caught:
        training(tmp_path, "gpt2", "mased-lm")
    assert "masked-lm" in caught.value.hint
    with pytest.raises(ConfigError, match="gpt2 has no head for the task masked-lm") as caught:
        training(tmp_path, "gpt2", "masked-lm")
    assert "causal-lm" in caught.value.hint


def test_a_model_that_fits_no_task_is_refused(tmp_path):
    CONFIGS["detr"] = {"model_type": "sam", "architectures": ["SamModel"]}
    try:
        with pytest.raises(ModelError, match="model_type sam") as caught:
            training(tmp_path, "detr")
    finally:
        del CONFIGS["detr"]
    assert "module:function" in caught.value.hint


def test_a_text_head_of_a_larger_model_is_made_of_the_texts_part(tmp_path):
    path = model_directory(tmp_path, "gemma3", architectures=["Gemma3ForCausalLM"])
    source = load_source(path, Shape(seq=12))
    model = source.work.build_model()
    assert source.task == "causal-lm" and type(model.config).__name__ == "Gemma3TextConfig"
    assert torch.isfinite(model(**source.work.build_batch()).loss)


def test_every_task_has_a_table_in_the_installed_transformers():
    assert all(_mapping(task) for task in TASKS)

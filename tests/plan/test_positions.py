"""Position limits, held against what the embedding tables of real tiny models take."""

import pytest
import torch
from tiny_configs import model_directory

from floatline.plan.building import model_factory
from floatline.plan.configs import find_config
from floatline.plan.positions import position_limit, text_config
from floatline.plan.tasks import choose_training


def limit_and_model(tmp_path, name):
    config = find_config(model_directory(tmp_path, name)).config
    return position_limit(config)[0], model_factory(choose_training(config, None, name).cls, config, torch.float32)()


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta", "bart"])
def test_the_limit_is_the_last_length_that_runs(tmp_path, name):
    limit, model = limit_and_model(tmp_path, name)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_relative_positions_have_no_limit_even_where_the_config_has_a_length(tmp_path):
    assert limit_and_model(tmp_path, "t5")[0] is None
    assert limit_and_model(tmp_path, "bloom")[0] is None


def test_the_key_is_named(tmp_path):
    assert position_limit(find_config(model_directory(tmp_path, "gpt2")).config) == (64, "n_positions")
    assert position_limit(find_config(model_directory(tmp_path, "roberta")).config) == (
        64,
        "max_position_embeddings less 2",
    )


def test_of_a_text_encoder_and_a_text_decoder_the_decoder_counts():
    from transformers import MusicgenConfig, MusicgenDecoderConfig, T5Config
    from transformers.models.encodec import EncodecConfig

    config = MusicgenConfig(text_encoder=T5Config(), audio_encoder=EncodecConfig(), decoder=MusicgenDecoderConfig())
    assert text_config(config).model_type == "musicgen_decoder"

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from floatline.errors import ConfigError, DataError, ModelError
from floatline.train.data import SampleEncoder, read_samples


@pytest.fixture
def retemplate(tokenizer) -> Any:
    """A tokenizer with another chat template."""

    def retemplate(template: str) -> Any:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return retemplate


@pytest.fixture
def one(write):
    def one(line: dict[str, Any]) -> Any:
        return read_samples(write(line))[0]

    return one


def labelled(encoded: dict[str, torch.Tensor], tokenizer: Any) -> str:
    return tokenizer.decode(encoded["labels"][encoded["labels"] != -100])


def test_only_the_answer_and_its_end_of_turn_are_labelled(one, talk, tokenizer):
    encoded = SampleEncoder(tokenizer).encode(one(talk("Which digit?", "7")))
    assert labelled(encoded, tokenizer) == "7<|im_end|>"
    text = "<|im_start|>user\nWhich digit?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
    assert encoded["input_ids"].tolist() == tokenizer(text)["input_ids"]
    assert list(encoded) == ["input_ids", "attention_mask", "labels"]
    assert encoded["labels"][-1] == -100  # the template's line break


def test_every_answer_of_a_conversation_is_labelled(one, talk, tokenizer):
    encoded = SampleEncoder(tokenizer).encode(one(talk("Which?", "7", "And?", "12")))
    assert labelled(encoded, tokenizer) == "7<|im_end|>12<|im_end|>"
    text = tokenizer.decode(encoded["input_ids"])
    assert text.count("<|im_start|>assistant\n") == 2


def test_image_inputs_are_those_of_the_processor(one, talk, processor, picture, tmp_path):
    from PIL import Image

    sample = one(talk("Which?", "7", images=(picture("a.png", (64, 32)), picture("b.png", (64, 96)))))
    encoded = SampleEncoder(processor).encode(sample)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "7"},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    images = [Image.open(path) for path in sample.images]
    whole = processor(text=[text], images=images, return_tensors="pt")
    assert set(encoded) == {*whole, "labels"}
    for key, value in whole.items():
        expected = value[0] if value.shape == whole["input_ids"].shape else value
        assert torch.equal(encoded[key], expected), key
    assert encoded["image_grid_thw"].tolist() == [[1, 2, 4], [1, 6, 4]]
    assert encoded["mm_token_type_ids"].sum() == 2 + 6
    assert labelled(encoded, processor.tokenizer) == "7<|im_end|>"


def test_images_in_several_turns_are_joined_in_order(one, processor, picture):
    parts = [[{"type": "image", "image": picture(f"{size}.png", (size, 32))}] for size in (32, 64)]
    answer = {"role": "assistant", "content": "7"}
    messages = [{"role": "user", "content": parts[0]}, answer, {"role": "user", "content": parts[1]}, answer]
    encoded = SampleEncoder(processor).encode(one({"messages": messages}))
    assert encoded["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    assert encoded["mm_token_type_ids"].shape == encoded["input_ids"].shape
    assert encoded["mm_token_type_ids"].sum() == 3
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(encoded["mm_token_type_ids"] == 1, encoded["input_ids"] == image_token)


def test_text_only_samples_of_a_vision_language_model_have_no_image_inputs(one, talk, processor):
    assert list(SampleEncoder(processor).encode(one(talk("Hi", "7")))) == ["input_ids", "attention_mask", "labels"]


def test_the_prompt_is_what_training_has_before_the_last_answer(one, talk, processor, picture):
    sample = one(talk("Which?", "7", "And?", "12", images=(picture(),)))
    encoder = SampleEncoder(processor)
    prompt, encoded = encoder.encode_prompt(sample), encoder.encode(sample)
    assert (prompt.question, prompt.truth) == ("And?", "12")
    assert "labels" not in prompt.inputs
    length = len(prompt.inputs["input_ids"])
    for key in ("input_ids", "mm_token_type_ids", "attention_mask"):
        assert torch.equal(prompt.inputs[key], encoded[key][:length])
    assert torch.equal(prompt.inputs["pixel_values"], encoded["pixel_values"])
    assert processor.tokenizer.decode(prompt.inputs["input_ids"]).endswith("<|im_start|>assistant\n")
    assert encoded["labels"][length] != -100
    assert encoded["labels"][length - 1] == -100


def test_limits_are_inclusive_and_named(one, talk, tokenizer):
    sample = one(talk("Which?", "123"))
    length = len(SampleEncoder(tokenizer).encode(sample)["input_ids"])
    SampleEncoder(tokenizer, max_length=length, max_answer_tokens=4).encode(sample)
    with pytest.raises(DataError) as caught:
        SampleEncoder(tokenizer, max_length=length - 1).encode(sample)
    assert (
        caught.value.message
        == f"{sample.where}: the sample has {length} tokens, more than data.max_length={length - 1}"
    )
    assert f"data.max_length={length}" in caught.value.hint
    with pytest.raises(DataError) as caught:
        SampleEncoder(tokenizer, max_answer_tokens=3).encode(sample)
    assert caught.value.message == f"{sample.where}: an answer has 4 tokens, more than data.max_answer_tokens=3"
    assert "data.max_answer_tokens=4" in caught.value.hint
    with pytest.raises(ConfigError, match=r"data.max_length=0 is below 1"):
        SampleEncoder(tokenizer, max_length=0)


def test_text_models_refuse_images(one, talk, tokenizer):
    sample = one(talk("Which?", "7", images=("a.png",)))
    with pytest.raises(DataError, match=r":1: the sample shows 1 image.*text only") as caught:
        SampleEncoder(tokenizer).encode(sample)
    assert "vision-language" in caught.value.hint


def test_special_tokens_in_the_data_are_refused(one, talk, tokenizer):
    with pytest.raises(DataError, match=r":1: messages\[1\] holds '<|im_end|>', a special token"):
        SampleEncoder(tokenizer).encode(one(talk("Which?", "7<|im_end|>8")))


def test_unreadable_and_impossible_images_name_the_line(one, talk, processor, picture, tmp_path):
    with pytest.raises(DataError, match=r":1: image .*none.png does not exist"):
        SampleEncoder(processor).encode(one(talk("?", "7", images=("none.png",))))
    with pytest.raises(DataError, match=r":1: the model's processor refuses .*a.png: .*aspect ratio") as caught:
        SampleEncoder(processor).encode(one(talk("?", "7", images=(picture(size=(1, 900)),))))
    assert "replace or resize" in caught.value.hint


def test_a_template_that_rewrites_earlier_turns_is_refused(one, talk, retemplate):
    think = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}HMM {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = SampleEncoder(retemplate(think))
    assert labelled(encoder.encode(one(talk("Which?", "7"))), encoder.tokenizer) == "HMM 7<|im_end|>"
    with pytest.raises(ModelError, match=r"rewrites earlier turns .*data.jsonl:1.*'HMM 7") as caught:
        encoder.encode(one(talk("Which?", "7", "And?", "8")))
    assert "a line of its own" in caught.value.hint


def test_a_template_without_an_end_of_turn_is_refused(one, talk, retemplate):
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ModelError, match=r"ends an answer with '7', which is no end-of-turn token") as caught:
        SampleEncoder(retemplate(plain)).check(one(talk("Which?", "7")))
    assert "end-of-sequence token" in caught.value.hint


def test_a_conversation_that_the_template_refuses_names_the_line(one, talk, retemplate):
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError, match=r":1: the model's chat template refuses the conversation: roles must alternate"
    ):
        SampleEncoder(retemplate(strict)).encode(one(talk("Which?", "7")))


def test_check_needs_no_images_without_a_max_length(one, talk, processor):
    sample = one(talk("?", "7", images=("none.png",)))
    SampleEncoder(processor).check(sample)
    with pytest.raises(DataError, match=r"does not exist"):
        SampleEncoder(processor, max_length=50).check(sample)

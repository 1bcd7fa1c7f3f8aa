"""The demo's data and model: honest split, same bytes each time, an ordinary checkpoint directory."""

import json

import numpy as np
import pytest
import scenes
import torch

from floatline.train.data import read_samples
from floatline.train.hub import load_model, load_processor


def test_no_scan_appears_on_two_sides():
    sides = scenes.split_scans(seed=0)
    prints = {side: {image.tobytes() for image in scans.images} for side, scans in sides.items()}
    assert sum(len(scans.labels) for scans in sides.values()) == 1797
    assert not prints["train"] & prints["test"] and not prints["train"] & prints["validation"]
    assert not prints["validation"] & prints["test"]


def test_same_arguments_same_bytes(tmp_path):
    for name in ("a", "b"):
        scenes.write_scenes(tmp_path / name, train=5, validation=2, test=2, seed=3)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 3 + 9
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_answers_are_true_to_the_picture(digits):
    """Every digit question of a read scene names a digit that the reading has; counts are lengths."""
    by_image = {}
    for line in (digits / "data/train.jsonl").read_text().splitlines():
        sample = json.loads(line)
        image = sample["messages"][0]["content"][0]["image"]
        by_image.setdefault(image, {})[sample["kind"]] = sample["messages"][1]["content"][0]["text"]
    read = [kinds for kinds in by_image.values() if "read" in kinds]
    assert len(read) > 20
    for kinds in read:
        figures = kinds["read"].split()
        assert kinds["digit"] in figures
        assert kinds.get("count", str(len(figures))) == str(len(figures))


def test_places_are_where_the_words_say(digits):
    """A scene asked for its bottom right has ink there."""
    from PIL import Image

    corners = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
    seen = 0
    for sample in read_samples(digits / "data/train.jsonl"):
        words = next((words for words in corners if words in sample.messages[0].text), None)
        if words is None:
            continue
        row, column = corners[words]
        pixels = np.asarray(Image.open(sample.images[0]))[row * 32 :, column * 32 :][:32, :32]
        assert pixels.min() < 120, sample.where
        seen += 1
    assert seen > 5


def test_the_model_is_an_ordinary_checkpoint(digits):
    from transformers import Qwen3VLForConditionalGeneration

    model = load_model(str(digits / "model"), "fp32")
    assert type(model) is Qwen3VLForConditionalGeneration
    assert 1.3e6 < sum(p.numel() for p in model.parameters()) < 1.6e6
    processor = load_processor(str(digits / "model"))
    content = [{"type": "image"}, {"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_attention_kernel_can_be_chosen(digits):
    torch.manual_seed(0)
    ids = torch.randint(10, 200, (1, 9))
    outputs = []
    for attention in ("eager", "sdpa"):
        model = load_model(str(digits / "model"), "fp32", attention)
        assert model.config.text_config._attn_implementation == attention
        outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["recipe.yaml"])
def test_the_recipe_is_valid(name):
    from pathlib import Path

    from floatline.train import load_recipe

    assert load_recipe(Path(scenes.__file__).parent / name).train.batch_size == 32

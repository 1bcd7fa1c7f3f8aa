"""Vision-language batches: the numbers of known models, and where the images lie in the rows."""

import pytest
from tiny_configs import CONFIGS, model_directory

from floatline.errors import ConfigError, ModelError
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source


@pytest.mark.parametrize(
    ("name", "image", "visual", "pixels"),
    [
        ("qwen3-vl-2b", (1024, 1024), 1024, (4096, 1536)),
        ("qwen3-vl-8b", (512, 256), 128, (512, 1536)),
        ("qwen2.5-vl-3b", (1024, 1024), 1369, (5476, 1176)),
        ("qwen2-vl-2b", (224, 224), 64, (256, 1176)),
        ("gemma-3-4b", None, 256, (1, 3, 896, 896)),
        ("llava-1.5-7b", None, 576, (1, 3, 336, 336)),
        ("smolvlm-256m", (1024, 1024), 1088, (1, 17, 3, 512, 512)),
        ("smolvlm2-2.2b", (1024, 1024), 1377, (1, 17, 3, 384, 384)),
    ],
)
def test_known_models_see_the_known_number_of_tokens(name, image, visual, pixels):
    source = load_source(name, Shape(image=image))
    batch = source.work.build_batch()
    assert source.facts["visual_tokens"] == visual
    assert batch["pixel_values"].shape == pixels
    assert source.shape.seq - 256 - visual in (0, 2)  # start and end of the image, where there are such


def test_the_image_lies_between_start_and_end_and_is_not_learned():
    batch = load_source("qwen3-vl-2b", Shape(batch=2, image=(256, 256))).work.build_batch()
    row, labels = batch["input_ids"][1].tolist(), batch["labels"][1].tolist()
    assert row[:66] == [151652, *[151655] * 64, 151653]
    assert labels[:66] == [-100] * 66 and labels[66:] == row[66:]
    assert not {151652, 151653, 151655, 151656} & set(row[66:])
    assert batch["mm_token_type_ids"][1].tolist() == [0] + [1] * 64 + [0] * (len(row) - 65)
    assert batch["image_grid_thw"].tolist() == [[1, 16, 16]] * 2


def test_several_images_and_none(tmp_path):
    source = load_source("qwen3-vl-2b", Shape(batch=2, images=3, image=(256, 256), seq=500))
    batch = source.work.build_batch()
    assert batch["image_grid_thw"].shape == (6, 3) and batch["pixel_values"].shape == (6 * 256, 1536)
    assert source.facts == {"tokens": 500, "visual_tokens": 192, "patches": 768}
    alone = source.reshaped(Shape(images=0, seq=100)).work.build_batch()
    assert "pixel_values" not in alone and alone["mm_token_type_ids"].sum() == 0


def test_rounding_is_told():
    assert "resizes 1000x700 to 992x704 (blocks of 32" in load_source("qwen3-vl-2b", Shape(image=(1000, 700))).notes[0]
    assert (
        "resizes every image, 1024x1024 too, to 896x896"
        in load_source("gemma-3-4b", Shape(image=(1024, 1024))).notes[0]
    )
    assert "17 tiles of 512x512, 64 tokens each" in load_source("smolvlm-256m").notes[0]
    assert "resizes" not in load_source("qwen3-vl-2b").notes[0]


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(
        ConfigError, match="seq=1026 does not hold the 1026 tokens of one image and a token of text"
    ) as e:
        load_source("qwen3-vl-2b", Shape(seq=1026))
    assert "seq=1282" in e.value.hint
    with pytest.raises(ConfigError, match=r"100 images of 137100 tokens are over the 32768 positions of qwen2-vl-2b"):
        load_source("qwen2-vl-2b", Shape(images=100))
    with pytest.raises(ConfigError, match="images=0 trains on text alone"):
        load_source("qwen3-vl-2b", Shape(images=0, image=(64, 64)))
    with pytest.raises(ConfigError, match="more than 200 times the other"):
        load_source("qwen3-vl-2b", Shape(image=(4000, 16)))
    with pytest.raises(
        ConfigError, match=r"seq=262145 is over the 262144 positions.*text_config.max_position_embeddings"
    ):
        load_source("qwen3-vl-2b", Shape(seq=262145))


def test_huge_images_are_cut_to_the_processors_limit():
    source = load_source("qwen3-vl-2b", Shape(image=(8000, 8000)))
    assert source.facts["visual_tokens"] == (4096 // 32) ** 2


def test_a_family_whose_images_are_not_known_says_what_to_do(tmp_path):
    CONFIGS["blip"] = {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"]}
    try:
        with pytest.raises(ModelError, match="how blip reads images is not known here") as caught:
            load_source(model_directory(tmp_path, "blip"))
    finally:
        del CONFIGS["blip"]
    assert "module:function" in caught.value.hint

"""Image sizes: a model's own, another one that it takes, and one that it does not."""

import pytest
import torch
from tiny_configs import model_directory

from floatline.errors import ConfigError
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.step.batch import default_loss


def source(tmp_path, name, **sizes):
    return load_source(model_directory(tmp_path, name), Shape(**sizes))


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "convnext", "resnet"])
@pytest.mark.parametrize("image", [(64, 48), (32, 64)])
def test_another_size_runs_when_it_is_accepted(tmp_path, name, image):
    made = source(tmp_path, name, image=image)
    assert torch.isfinite(default_loss(made.work.build_model(), made.work.build_batch()))


def test_vit_interpolates_and_says_so(tmp_path):
    made = source(tmp_path, "vit", image=(64, 64))
    assert made.work.build_batch()["interpolate_pos_encoding"] is True
    assert made.notes == ("position embeddings are interpolated from 32x32",)
    assert "interpolate_pos_encoding" not in source(tmp_path, "vit", image=(32, 32)).work.build_batch()


def test_an_image_too_small_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vit does not take images of 4x4") as caught:
        source(tmp_path, "vit", image=(4, 4))
    assert "(32, 32)" in caught.value.hint


def test_pairs_have_one_image_size(tmp_path):
    with pytest.raises(ConfigError, match="clip takes 32x32 only"):
        source(tmp_path, "clip", image=(64, 64))
    assert source(tmp_path, "clip").shape == Shape(batch=2, seq=16, image=(32, 32))

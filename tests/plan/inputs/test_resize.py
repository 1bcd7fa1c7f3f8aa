"""Resize rules, held against the image processors of transformers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError
from floatline.plan.inputs.resize import pixel_range, tiles, to_blocks

sides = st.integers(1, 5000)


@given(sides, sides, st.sampled_from([28, 32]), st.sampled_from([3136, 65536]), st.sampled_from([10**6, 12845056]))
def test_blocks_are_those_of_the_processor(height, width, block, least, most):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ConfigError, match="more than 200 times the other"):
            to_blocks((height, width), block, least, most)
        return
    assert to_blocks((height, width), block, least, most) == smart_resize(height, width, block, least, most)


@given(sides, sides, st.sampled_from([(2048, 512), (1536, 384), (1456, 364), (512, 512)]), st.booleans())
def test_tiles_are_those_of_the_processor(height, width, sizes, split):
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    longest, tile = sizes
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, do_image_splitting=split
    )
    counted = processor.get_number_of_image_patches(height, width)
    assert tiles((height, width), longest, tile, split) == max(1, counted[0])


def test_the_range_of_pixels_comes_from_the_processor_then_from_the_family():
    assert pixel_range("qwen3_vl", {"min_pixels": 10, "max_pixels": 20}) == (10, 20)
    assert pixel_range("qwen3_vl", {"size": {"shortest_edge": 30, "longest_edge": 40}}) == (30, 40)
    assert pixel_range("qwen3_vl", {}) == (65536, 16777216)
    assert pixel_range("qwen2_vl", {"max_pixels": 50}) == (3136, 50)
    assert pixel_range("else", {}) == (1, None)

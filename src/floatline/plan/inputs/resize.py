"""How vision-language families turn an image into patches: the arithmetic of their image processors, without pixels.

Three rules, and what an image of 1024 x 1024 becomes:

    packed patches   Qwen-VL, GLM-V ...: rounded to whole blocks of merged patches, within a range of pixels
                     Qwen3-VL: 64 x 64 patches of 16 pixels, 2 x 2 merged: 1024 tokens
    tiles            Idefics3, SmolVLM: the long side scaled to a fixed length, cut into squares, the whole as one more
                     SmolVLM-256M: 2048 x 2048, 16 squares of 512 and one of all: 17 tiles of 64 tokens
    one size         LLaVA, Gemma 3, PaliGemma ...: every image resized to the tower's size
                     Gemma 3: 896 x 896, 256 tokens

Source: the image processors of transformers (`image_processing_qwen2_vl`, `image_processing_idefics3`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from floatline.errors import ConfigError

Size = tuple[int, int]

PIXELS: dict[str, tuple[int, int]] = {
    "qwen2_vl": (56 * 56, 16384 * 28 * 28),
    "qwen2_5_vl": (56 * 56, 16384 * 28 * 28),
    "qwen3_vl": (256 * 256, 4096 * 4096),
    "qwen3_vl_moe": (256 * 256, 4096 * 4096),
}
"""Fewest and most pixels of the published processors, for a config without a processor beside it."""


def pixel_range(model_type: str, processor: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return the fewest and the most pixels of a family of packed patches; None where no limit is known."""
    size = processor.get("size") or {}
    least = processor.get("min_pixels") or size.get("shortest_edge")
    most = processor.get("max_pixels") or size.get("longest_edge")
    known = PIXELS.get(model_type, (1, None))
    return int(least or known[0]), most or known[1]


def to_blocks(image: Size, block: int, least: int, most: int | None) -> Size:
    """Return the size that an image is resized to: multiples of `block`, `least` to `most` pixels in all.

    >>> to_blocks((1024, 1024), 32, 65536, 16777216), to_blocks((1000, 700), 28, 3136, 12845056)
    ((1024, 1024), (1008, 700))

    Raises:
        ConfigError: One side is more than 200 times the other.
    """
    height, width = image
    if max(image) > 200 * min(image):
        raise ConfigError(
            f"image={height}x{width}: one side is more than 200 times the other, which the processor refuses",
            hint="use an image that is less narrow",
        )
    area = height * width
    rounded = round(height / block) * block, round(width / block) * block
    if most is not None and rounded[0] * rounded[1] > most:
        shrink = math.sqrt(area / most)
        return tuple(max(block, math.floor(side / shrink / block) * block) for side in image)  # type: ignore[return-value]
    if rounded[0] * rounded[1] < least:
        grow = math.sqrt(least / area)
        return tuple(math.ceil(side * grow / block) * block for side in image)  # type: ignore[return-value]
    return rounded


def tiles(image: Size, longest: int, tile: int, split: bool = True) -> int:
    """Return the number of squares that an image is cut into, the one of the whole image included.

    >>> tiles((1024, 1024), 2048, 512), tiles((300, 600), 2048, 512), tiles((300, 600), 2048, 512, split=False)
    (17, 9, 1)
    """
    if not split:
        return 1
    tall = image[0] > image[1]
    long, short = max(image), min(image)
    aspect = image[1] / image[0]
    resized = int(longest * aspect if tall else longest / aspect)
    resized += resized % 2
    long = math.ceil(longest / tile) * tile
    short = math.ceil(int(long * (resized / longest)) / tile) * tile
    rows, columns = long // tile, max(1, short // tile)
    return 1 if rows == columns == 1 else rows * columns + 1

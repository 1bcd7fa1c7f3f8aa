"""Batches for vision-language models: as many image tokens as the family's processor would write, then text.

A sample is `[start] image tokens [end]` for each image, then text up to `seq`. Labels skip the images' tokens. Text is
what `seq` leaves; markers that a processor writes between the tiles of an image count as text.

Not covered: video, models whose images come with sizes of their own (LLaVA-NeXT, Pixtral), cross-attention
to images (Mllama).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.plan.building import on_meta
from floatline.plan.inputs.layout import Layout, noise, real, special_ids, token_ids
from floatline.plan.inputs.resize import pixel_range, tiles, to_blocks
from floatline.plan.inputs.text import NO_MASK
from floatline.plan.inputs.vision import vision_model_error
from floatline.plan.positions import position_limit, text_config
from floatline.plan.shape import Filling
from floatline.step.batch import IGNORED

TEXT = 256
SQUARE = (1024, 1024)


@dataclass(frozen=True, kw_only=True)
class Images:
    """What one image costs and how a batch of them is made.

    Args:
        tokens: Image tokens of one image.
        tensors: `(samples, images a sample)` -> the tensors beside the ids.
        start, end: Ids around an image's tokens, where the family has them.
        facts: Counts an image.
        note: How the image was resized; empty when it was not.
    """

    tokens: int = 0
    tensors: Callable[[int, int], dict[str, torch.Tensor]] = lambda samples, images: {}
    start: int | None = None
    end: int | None = None
    facts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def length(self) -> int:
        """Tokens of one image with its start and end."""
        return self.tokens + (self.start is not None) + (self.end is not None)


def lay_out_vision_language(filling: Filling, config: Any, cls: Any, processor: Mapping[str, Any]) -> Layout:
    """Lay out a batch of images and text.

    Args:
        filling: The shape asked for.
        config: The model's config.
        cls: The model's class.
        processor: Facts of its image processor, as in preprocessor_config.json; may be empty.

    Raises:
        ConfigError: `seq` does not hold the images, or is over the position limit.
        ModelError: The family's images are not known.
    """
    filling.refuse("target", "seconds")
    count = int(filling.take("images", 1, "one image a sample"))
    if count == 0 and filling.shape.image is not None:
        raise ConfigError("image was given, but images=0 trains on text alone", hint="leave one of them out")
    images = _describe(filling, config, cls, processor) if count else Images()
    text = text_config(config)
    limit, key = position_limit(text)
    batch = filling.batch()
    seq = _sequence(filling, count, images, limit, f"text_config.{key}")
    compose = _Composer(config, cls, count, images)

    def make() -> dict[str, torch.Tensor]:
        ids = token_ids(batch, seq, text.vocab_size, special_ids(config))
        return {**compose(ids), **(images.tensors(batch, count) if count else {})}

    return Layout(
        shape=filling.shape,
        batch=make,
        limits={} if limit is None else {"seq": limit},
        choices=tuple(filling.choices),
        notes=tuple(note for note in (images.note, NO_MASK) if note),
        facts={"tokens": seq, "visual_tokens": count * images.tokens} | {k: count * n for k, n in images.facts.items()},
    )


def _sequence(filling: Filling, count: int, images: Images, limit: int | None, key: str) -> int:
    visual = count * images.length
    if filling.shape.seq is not None and filling.shape.seq <= visual:
        raise ConfigError(
            f"seq={filling.shape.seq} does not hold the {visual} tokens of {_plural(count)} and a token of text",
            hint=f"use seq={visual + TEXT}, or a smaller image",
        )
    if limit is not None and visual >= limit:
        raise ConfigError(
            f"{_plural(count)} of {visual} tokens are over the {limit} positions of {filling.model} ({key})",
            hint="use a smaller image or fewer of them",
        )
    reason = f"{visual} tokens of {_plural(count)} and {TEXT} of text" if count else "a usual length for text alone"
    return filling.length("seq", visual + TEXT if count else 2048, reason, limit, key)


def _plural(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


class _Composer:
    """Writes the images into rows of text ids."""

    def __init__(self, config: Any, cls: Any, count: int, images: Images) -> None:
        self.token: Any = getattr(config, "image_token_id", None)
        self.count, self.images = count, images
        self.paligemma = config.model_type == "paligemma"
        takes = inspect.signature(cls.forward).parameters
        self.kinds = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in takes), None)

    def __call__(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return input_ids, labels and, where the model reads them, the kinds of the tokens."""
        with real():
            row = self.count * ([self.images.start] + [self.token] * self.images.tokens + [self.images.end])
            head = torch.tensor([token for token in row if token is not None], dtype=torch.int64)
            ids[:, : len(head)] = head
            labels = ids.clone()
            labels[:, : len(head)] = IGNORED
            shown = (ids == self.token).to(torch.int64) if self.count else torch.zeros_like(ids)
            # PaliGemma's kinds tell the prefix (0) from the text to learn (1), the others' images (1) from text (0)
            kinds = (labels != IGNORED).long() if self.paligemma else shown
        return {"input_ids": ids, "labels": labels} | ({self.kinds: kinds} if self.kinds else {})


def _describe(filling: Filling, config: Any, cls: Any, processor: Mapping[str, Any]) -> Images:
    vision = getattr(config, "vision_config", None)
    if "image_grid_thw" in inspect.signature(cls.forward).parameters and hasattr(vision, "spatial_merge_size"):
        return _packed(filling, config, processor)
    if config.model_type in ("idefics3", "smolvlm"):
        return _tiled(filling, config, processor)
    if hasattr(cls, "get_image_features") and getattr(vision, "image_size", None):
        return _one_size(filling, config, cls)
    raise vision_model_error(filling)


def _packed(filling: Filling, config: Any, processor: Mapping[str, Any]) -> Images:
    vision = config.vision_config
    image = filling.take("image", SQUARE, "the model takes any size; a usual one")
    block = vision.patch_size * vision.spatial_merge_size
    least, most = pixel_range(config.model_type, processor)
    height, width = to_blocks(image, block, least, most)
    rows, columns = height // vision.patch_size, width // vision.patch_size
    depth = getattr(vision, "temporal_patch_size", 1)  # a still image is repeated over the frames of a patch
    channels: Any = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)

    def tensors(samples: int, images: int) -> dict[str, torch.Tensor]:
        one = noise(1, rows * columns, channels * depth * vision.patch_size**2)
        pixels = one.expand(samples * images, -1, -1).reshape(samples * images * rows * columns, -1)
        with real():
            grid = torch.tensor([[1, rows, columns]]).repeat(samples * images, 1)
        return {"pixel_values": pixels, "image_grid_thw": grid}

    pixels = f"{least} to {most} pixels" if most else f"{least} pixels or more"
    resized = f"the processor resizes {image[0]}x{image[1]} to {height}x{width} (blocks of {block}, {pixels})"
    return Images(
        tokens=rows * columns // vision.spatial_merge_size**2,
        tensors=tensors,
        start=_first_id(config, "vision_start_token_id", "image_start_token_id"),
        end=_first_id(config, "vision_end_token_id", "image_end_token_id"),
        facts={"patches": rows * columns},
        note="" if image == (height, width) else resized,
    )


def _first_id(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _tiled(filling: Filling, config: Any, processor: Mapping[str, Any]) -> Images:
    vision = config.vision_config
    image = filling.take("image", SQUARE, "the model takes any size; a usual one")
    tile = int((processor.get("max_image_size") or {}).get("longest_edge", vision.image_size))
    longest = int((processor.get("size") or {}).get("longest_edge", 4 * tile))
    count = tiles(image, longest, tile, processor.get("do_image_splitting", True))
    each = (tile // vision.patch_size // config.scale_factor) ** 2

    def tensors(samples: int, images: int) -> dict[str, torch.Tensor]:
        with real():
            mask = torch.ones(samples, images * count, tile, tile, dtype=torch.int64)
        return {"pixel_values": noise(samples, images * count, 3, tile, tile), "pixel_attention_mask": mask}

    return Images(
        tokens=count * each,
        tensors=tensors,
        facts={"tiles": count},
        note=f"the processor scales {image[0]}x{image[1]} to a long side of {longest} and cuts it into {count} tiles "
        f"of {tile}x{tile}, {each} tokens each",
    )


def _one_size(filling: Filling, config: Any, cls: Any) -> Images:
    vision = config.vision_config
    size = vision.image_size if isinstance(vision.image_size, list | tuple) else (vision.image_size,) * 2
    height, width = int(size[0]), int(size[1])
    image = filling.take("image", (height, width), "vision_config.image_size")
    channels = getattr(vision, "num_channels", 3)

    def tensors(samples: int, images: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": noise(samples * images, channels, height, width)}

    resized = f"the processor resizes every image, {image[0]}x{image[1]} too, to {height}x{width}"
    tokens = _features_of_one(filling, config, cls, (channels, height, width))
    return Images(tokens=tokens, tensors=tensors, note="" if image == (height, width) else resized)


def _features_of_one(filling: Filling, config: Any, cls: Any, image: tuple[int, int, int]) -> int:
    """Count the feature rows of one image by a run of the vision tower on the meta device."""
    from torch.utils._pytree import tree_leaves

    model: Any = on_meta(cls, config)
    try:
        with real(), torch.no_grad():
            out = model.get_image_features(pixel_values=torch.empty(1, *image, device="meta"))
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise vision_model_error(filling, str(error).splitlines()[0]) from error
    found = getattr(out, "pooler_output", out)
    rows = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() for leaf in rows) // int(text_config(config).hidden_size)

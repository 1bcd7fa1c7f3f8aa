"""Image batches: classification, and image-text pairs for CLIP and SigLIP.

Whether a model takes another image size than its config's is not looked up but tried: one forward on the meta
device, which costs no memory. A model that refuses is tried once more with `interpolate_pos_encoding=True`, as
a user would.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError, ModelError
from floatline.plan.building import on_meta
from floatline.plan.inputs.layout import Layout, class_ids, noise, real, special_ids, token_ids
from floatline.plan.positions import position_limit
from floatline.plan.shape import Filling
from floatline.step.batch import Batch


def lay_out_images(filling: Filling, config: Any, cls: type) -> Layout:
    """Lay out a batch for an image classifier: pixel_values (batch, channels, height, width) and labels (batch,)."""
    filling.refuse("seq", "target", "images", "seconds")
    own = _own_size(config)
    image = filling.take("image", own or (224, 224), "the config's image_size" if own else "a usual size")
    channels = getattr(config, "num_channels", 3)
    extra = {} if image == own else _extra_arguments(filling, config, cls, (channels, *image))
    batch = filling.batch()

    def make() -> dict[str, Any]:
        return {"pixel_values": noise(batch, channels, *image), "labels": class_ids(batch, config.num_labels), **extra}

    return Layout(
        shape=filling.shape,
        batch=make,
        choices=tuple(filling.choices),
        notes=(f"position embeddings are interpolated from {own[0]}x{own[1]}",) if extra and own else (),
    )


def lay_out_pairs(filling: Filling, config: Any) -> Layout:
    """Lay out image-text pairs with a contrastive loss over the batch: input_ids and pixel_values."""
    filling.refuse("target", "images", "seconds")
    text, vision = config.text_config, config.vision_config
    size = _own_size(vision) or (224, 224)
    image = filling.take("image", size, "vision_config.image_size")
    if image != size:
        raise ConfigError(
            f"image={image[0]}x{image[1]}: {filling.model} takes {size[0]}x{size[1]} only",
            hint="leave the image size out: the processor resizes every image to it",
        )
    limit, key = position_limit(text)
    batch = int(filling.take("batch", 2, "a contrastive loss needs a pair to tell apart"))
    seq = filling.length("seq", limit or 64, "captions are padded to it", limit, f"text_config.{key}")
    special = special_ids(config)

    def make() -> dict[str, torch.Tensor]:
        pixels = noise(batch, vision.num_channels, *image)
        return {"input_ids": token_ids(batch, seq, text.vocab_size, special), "pixel_values": pixels}

    return Layout(
        shape=filling.shape,
        batch=make,
        loss=contrastive_loss,
        limits={} if limit is None else {"seq": limit},
        choices=tuple(filling.choices),
        facts={"tokens": seq},
    )


def contrastive_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the loss that CLIP-like models compute when asked."""
    loss: torch.Tensor = model(**batch, return_loss=True).loss
    return loss


def _own_size(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


def _extra_arguments(filling: Filling, config: Any, cls: Any, image: tuple[int, int, int]) -> dict[str, Any]:
    """Arguments with which the model takes an image of this size.

    Raises:
        ConfigError: It takes it with none.
    """
    takes = inspect.signature(cls.forward).parameters
    tries: list[dict[str, Any]] = [{}]
    if "interpolate_pos_encoding" in takes:
        tries.append({"interpolate_pos_encoding": True})
    model, said = on_meta(cls, config), ""
    for extra in tries:
        try:
            with real(), torch.no_grad():
                model(pixel_values=torch.empty(1, *image, device="meta"), **extra)
            return extra
        except (ValueError, RuntimeError) as error:
            said = str(error).splitlines()[0]
    raise ConfigError(
        f"{filling.model} does not take images of {image[1]}x{image[2]}: {said}",
        hint=f"use its own size {_own_size(config)}" if _own_size(config) else "use another image size",
    )


def vision_model_error(filling: Filling, said: str = "") -> ModelError:
    """The error for a vision-language model whose images this planner cannot lay out; `said` is what its tower said."""
    return ModelError(
        f"how {filling.model} reads images is not known here" + (f" (its vision tower: {said})" if said else ""),
        hint="give module:function that returns a floatline.Workload with a batch of yours, or images=0 for text alone",
    )

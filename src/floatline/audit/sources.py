"""What `floatline audit MODEL` audits: a model with its real weights, a batch for it, and notes on both.

MODEL is what `floatline plan` takes (plan/sources.py). Where it means a Hugging Face directory with weights in it, they
are read: rounding and range are properties of trained weights, and an initialised model has no outliers. Without
weights the model is initialised, and the notes say so.

A bare MODEL has no data. Its batch is random ids or noise, which is a fair test of formats but not of what the model
does on real text: the notes say that too. A recipe has real data (train/audit_recipe.py).

Not covered: quantised checkpoints, whose weights are no floats; weights in other files than safetensors and
pytorch_model.bin; code that a checkpoint brings along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floatline.audit.random_numbers import seeded
from floatline.audit.user_code import user_code
from floatline.errors import ConfigError, ModelError
from floatline.plan.building import config_to_build
from floatline.plan.configs import Found, find_config
from floatline.plan.room import available_memory
from floatline.plan.shape import Shape
from floatline.plan.sources import Source, load_source
from floatline.plan.tasks import choose_training, config_for

SMALL = Shape(batch=2, seq=128, target=64, image=(224, 224), seconds=2.0)
"""Sizes that are left open and would be larger: each pass also runs in fp64, dozens of times in all."""
HELD = 32
"""Bytes a parameter while an audit runs: fp32 model, copy, start and gradient, fp64 twins of weight and gradient."""
UNTRAINED = (
    "the weights are random: formats fail on trained weights' outliers, so an audit of untrained ones says little; "
    "give a directory with weights"
)
RANDOM_BATCH = "the batch is random ids or noise; a recipe is audited on its own data"


@dataclass(frozen=True, kw_only=True)
class AuditSource:
    """What is audited.

    Attributes:
        name: What the model is called.
        model: With its weights, fp32.
        batch: One batch, or a list.
        loss: As for `fl.audit`.
        optimizer: As for `fl.audit`.
        notes: Sentences a user should read.
    """

    name: str
    model: nn.Module
    batch: Any
    loss: Callable[..., torch.Tensor] | None = None
    optimizer: Any = None
    notes: tuple[str, ...] = ()


def load_audit_source(text: str, shape: Shape | None = None, *, task: str | None = None) -> AuditSource:
    """Return the model that `text` means, built and with a batch.

    Args:
        text: Directory, config.json, hub id in the local cache, `module:function` or bundled name.
        shape: Sizes of the batch; what is open is small (`SMALL`).
        task: As for `load_source`.

    Raises:
        ConfigError: A shape or task that the model does not take.
        ModelError: No such model, weights that cannot be read, or more than this machine's memory holds.
    """
    asked = shape or Shape()
    source = load_source(text, asked, task=task)
    if source.kind == "module":
        return _of_function(source)
    source = small(source, asked)
    _refuse_too_large(source)
    model, notes = _with_weights(find_config(text), source, task)
    sizes = f"audited on {source.shape}"
    return AuditSource(
        name=source.name,
        model=model,
        batch=source.work.build_batch(),
        loss=source.work.loss,
        notes=(sizes, RANDOM_BATCH, *notes, *source.notes),
    )


def _of_function(source: Source) -> AuditSource:
    own = source.work.optimizer
    with user_code(f"a factory of {source.name}", "", "run it on its own to see where"):
        model, batch = source.work.build_model(), source.work.build_batch()
    return AuditSource(
        name=source.name,
        model=model,
        batch=batch,
        loss=source.work.loss,
        optimizer=None if own is torch.optim.AdamW else own,  # which is what a Workload takes when nobody says
    )


def small(source: Source, asked: Shape) -> Source:
    """Return the source with open sizes no larger than `SMALL`, where the model takes them so small.

    Args:
        source: As loaded for `asked`.
        asked: Sizes that the user gave, which stay.
    """
    wanted = {field.name: getattr(SMALL, field.name) for field in fields(Shape)
              if getattr(asked, field.name) is None and _is_larger(source.shape, field.name)}  # fmt: skip
    if source.shape.batch == 1 and asked.batch is None:
        wanted["batch"] = SMALL.batch
    for dropped in (set[str](), {"seq"}, {"seq", "target", "image", "seconds"}):
        try:
            return source.reshaped(replace(asked, **{k: v for k, v in wanted.items() if k not in dropped}))
        except ConfigError:  # an image or labels that do not fit into so few tokens, a clip of a fixed length
            continue
    return source


def _is_larger(shape: Shape, name: str) -> bool:
    value, small = getattr(shape, name), getattr(SMALL, name)
    return value is not None and small is not None and value > small


def _refuse_too_large(source: Source) -> None:
    count = source.parameters or 0
    free = available_memory()
    if count * HELD > free:
        raise ModelError(
            f"{source.name} has {count / 1e9:.3g} G parameters: an audit holds at least {count * HELD / 2**30:.0f} GiB "
            f"with its fp64 twins, and {free / 2**30:.0f} GiB are free",
            hint="audit a config with fewer layers (num_hidden_layers), or on a machine with more memory",
        )


def _with_weights(found: Found, source: Source, task: str | None) -> tuple[nn.Module, list[str]]:
    if getattr(found.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{found.name} is quantised: its weights are no floats to audit", hint="give the checkpoint it was made of"
        )
    folder = Path(found.origin)
    if not folder.is_dir() or not any(holds_weights(file) for file in folder.iterdir()):
        with seeded(0, ()):
            return source.work.build_model(), [UNTRAINED]
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars for shards would break ours
    cls = choose_training(found.config, task, found.name).cls
    config = config_to_build(cls, config_for(cls, found.config))
    try:
        model, info = cls.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many types for one thing: it cannot be loaded
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the weights in {folder} cannot be loaded: {said}", hint="download or save the model again"
        ) from error
    missing = sorted(info["missing_keys"])
    if not missing:
        return model, []
    return model, [
        f"{len(missing)} weights are not in the checkpoint and are random, e.g. {missing[0]} "
        f"({cls.__name__}; another head: --task)"
    ]


def holds_weights(file: Path) -> bool:
    """Say whether a file of a model's directory holds its weights; adapters and optimizer state are none."""
    if file.name.startswith(("adapter_", "optimizer")):
        return False
    return file.suffix == ".safetensors" or (file.name.startswith("pytorch_model") and file.suffix == ".bin")

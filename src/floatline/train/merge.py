"""From a checkpoint of adapters to an ordinary model directory.

    from floatline.train import merge_checkpoint

    merge_checkpoint("runs/latest/checkpoints/step-00000100", "merged")

A checkpoint with LoRA holds adapters alone (adapter_weights.py) and loads with peft, but not everything that serves
models reads peft's format, and an adapter costs two small products in each layer. Merged, W + s B A is one weight, and
the directory loads as the base model did. The sum is made in fp32 and rounded to the format of the weights; in half
precision that rounding loses small updates, so compare the answers before throwing the adapters away.

Not covered: adapters of tied weights (one layer's sum would change the other), quantised base models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from floatline.errors import CheckpointError, ConfigError
from floatline.precision.islands import DTYPES
from floatline.techniques.adapters.state import adapted_layers, refuse_tied
from floatline.train.hub import holds_adapter, load_model, load_processor, require_transformers


def merge_checkpoint(checkpoint: str | Path, directory: str | Path, dtype: str | None = None) -> Path:
    """Write the base model with a checkpoint's adapters added in, and its processor, as a Hugging Face directory.

    Args:
        checkpoint: Directory in peft's format, as a run with LoRA writes it.
        directory: Where to write; made if missing, must be empty.
        dtype: "fp32", "bf16" or "fp16"; None takes the format of the base model's files.

    Returns:
        The directory.

    Raises:
        CheckpointError: `checkpoint` holds no adapters, or names no base model that is there.
        ConfigError: `directory` is not empty, a format that does not exist, a tied weight is adapted, or peft is
            missing.
        ModelError: The base model cannot be loaded.
    """
    checkpoint, directory = Path(checkpoint), Path(directory)
    base = _base_named_in(checkpoint)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there already", hint="name a new or an empty directory")
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise ConfigError(f"dtype={dtype!r}", hint="allowed: fp32, bf16, fp16")
    peft = _peft()
    model = peft.PeftModel.from_pretrained(load_model(base, dtype or _format_of(base)), checkpoint)
    for name, layer in adapted_layers(model).items():
        refuse_tied(model, name, layer)
    model.merge_and_unload().save_pretrained(directory)
    load_processor(str(checkpoint)).save_pretrained(directory)
    return directory


def _base_named_in(checkpoint: Path) -> str:
    if not holds_adapter(checkpoint):
        raise CheckpointError(
            f"{checkpoint} holds no adapters (adapter_config.json)",
            hint="give a checkpoint of a run with lora: RUN/checkpoints/step-*; others are whole models already",
        )
    base = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not base:
        raise CheckpointError(
            f"{checkpoint / 'adapter_config.json'} names no base model", hint="write it there: base_model_name_or_path"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise CheckpointError(
            f"the base model of {checkpoint} is not at {base} any more",
            hint="put it back, or write its place into adapter_config.json: base_model_name_or_path",
        )
    return str(base)


def _format_of(base: str) -> str:
    """Return the format that a model's files are in, fp32 where its config does not say."""
    try:
        dtype: Any = getattr(require_transformers().AutoConfig.from_pretrained(base), "dtype", None)
    except (OSError, ValueError):  # loading it will say so better
        dtype = None
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "merging adapters needs peft, which is not installed", hint='pip install "floatline[techniques]"'
        ) from None
    return peft

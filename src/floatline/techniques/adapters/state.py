"""The weights of a model with LoRA adapters: the adapters alone, the plain model, and both merged.

    adapter_state(model)      the adapters and the modules trained beside them, under peft's names
    save_adapter, load_adapter   the same as a directory that `peft.PeftModel.from_pretrained` reads
    plain_state_dict(model)   the base model's weights under its own names; `merged=True` with the adapters added in
    merge(model)              adds them to the base weights in place; the adapters start over at B = 0

A plain model's state dict loads into the adapted model directly (`accept_plain_weights`); adapters stay as they are.
The adapted model's own `state_dict()` keeps peft's names, so that a checkpoint of it resumes exactly. Of a model in
shards, adapters are saved and loaded too, which every rank must do; merging is not covered there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from floatline.errors import CheckpointError, ConfigError
from floatline.techniques.distributed.shards import full_tensor, laid_out_like

ADAPTER = "default"
"""Name of the one adapter."""
_PEFT_PREFIX = "base_model.model."


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters, by dotted name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def accept_plain_weights(layer: nn.Module) -> None:
    """Let a layer with an adapter load the state dict of the plain layer, its adapter staying as it is."""
    layer.register_load_state_dict_pre_hook(_rename_plain)


def _rename_plain(layer: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    own = layer.state_dict(keep_vars=True)
    base = [key for key in own if key.startswith("base_layer.")]
    if any(prefix + key in state for key in own):
        return
    for key in base:
        plain = prefix + key.removeprefix("base_layer.")
        if plain in state:
            state[prefix + key] = state.pop(plain)
    if any(prefix + key in state for key in base):
        state.update({prefix + key: value for key, value in own.items() if key not in base})


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return adapters and modules trained beside them, under the names in which peft saves them.

    Args:
        model: With `lora` applied.

    Returns:
        The tensors themselves, detached, not copies.

    Raises:
        ConfigError: The model has no adapters.
    """
    state = {}
    for name, layer in _require_adapters(model).items():
        for key, parameter in layer.named_parameters():
            if key.startswith("lora_"):
                state[f"{_PEFT_PREFIX}{name}.{key.replace(f'.{ADAPTER}', '')}"] = parameter.detach()
    for name in _config(model).modules_to_save or ():
        for key, value in model.get_submodule(name).state_dict().items():
            state[f"{_PEFT_PREFIX}{name}.{key}".replace("..", ".")] = value
    return state


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    base: str | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write the adapters so that `peft.PeftModel.from_pretrained(base_model, directory)` loads them.

    Args:
        model: With `lora` applied.
        directory: Made if missing; gets `adapter_model.safetensors` and `adapter_config.json`.
        base: Name or path of the base model to note down; None takes the one the model was loaded from.
        state: What `adapter_state` returned, whole, where it was gathered from shards before.

    Returns:
        The directory.
    """
    from safetensors.torch import save_file

    state = adapter_state(model) if state is None else state
    state = {key: full_tensor(value).cpu().clone().contiguous() for key, value in state.items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(model)
    before = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base or before[0], True
    try:
        config.save_pretrained(str(directory), auto_mapping_dict=_auto_mapping(model))
    finally:
        config.base_model_name_or_path, config.inference_mode = before
    return directory


def _auto_mapping(model: nn.Module) -> dict[str, str] | None:
    """Return the class that `peft.AutoPeftModel` makes the base model of, None where that is not transformers'."""
    kind = next((kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")), None)
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__} if kind is not None else None


@torch.no_grad()
def load_adapter(model: nn.Module, source: str | Path | dict[str, torch.Tensor]) -> None:
    """Load adapters into a model that has adapters of the same shape.

    Args:
        model: With `lora` applied.
        source: A directory in peft's format, or what `adapter_state` returned.

    Raises:
        CheckpointError: No such file, or other layers or ranks than the model's.
    """
    saved = source if isinstance(source, dict) else _read(Path(source))
    own = adapter_state(model)
    odd = sorted(saved.keys() ^ own.keys())
    if odd:
        raise CheckpointError(
            f"the adapter does not fit: {len(odd)} tensors are only in one of file and model, first {odd[0]}",
            hint="apply lora with the targets and train_also that it was saved with (adapter_config.json)",
        )
    for key, value in own.items():
        if saved[key].shape != value.shape:
            raise CheckpointError(
                f"the adapter does not fit: {key} is {tuple(saved[key].shape)}, in the model {tuple(value.shape)}",
                hint="apply lora with the rank that it was saved with (adapter_config.json)",
            )
        value.copy_(laid_out_like(saved[key].to(value.dtype), value))


def _read(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{directory} holds no adapter_model.safetensors", hint="give a directory saved by peft")
    state: dict[str, torch.Tensor] = load_file(path)
    return state


def plain_state_dict(model: nn.Module, *, merged: bool = False) -> dict[str, torch.Tensor]:
    """Return the state dict that the model would have without adapters.

    Args:
        model: With or without `lora` applied.
        merged: Add the adapters to the base weights (copies, in the base's dtype); False leaves them out.

    Raises:
        ConfigError: `merged`, and an adapted weight is tied to another.
    """
    names: dict[str, str | None] = {}
    sums: dict[str, torch.Tensor] = {}
    for name, layer in adapted_layers(model).items():
        for key in layer.state_dict():
            plain = f"{name}.{key.removeprefix('base_layer.')}" if key.startswith("base_layer.") else None
            names[f"{name}.{key}"] = plain
        if merged:
            refuse_tied(model, name, layer)
            sums[f"{name}.weight"] = _merged_weight(layer)
    state = {names.get(key, key): value for key, value in model.state_dict().items()}
    return {key: sums.get(key, value) for key, value in state.items() if key is not None}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to the base weights in place; they start over (A random, B = 0), so outputs stay as they are.

    Undoing `lora` then leaves the plain, merged model.

    Raises:
        ConfigError: No adapters, or an adapted weight is tied to another.
    """
    layers = _require_adapters(model)
    for name, layer in layers.items():
        refuse_tied(model, name, layer)
    for layer in layers.values():
        layer.base_layer.weight.copy_(_merged_weight(layer))
        layer.reset_lora_parameters(ADAPTER, True)


@torch.no_grad()
def _merged_weight(layer: Any) -> torch.Tensor:
    weight = layer.base_layer.weight
    total: torch.Tensor = weight.detach().float() + layer.get_delta_weight(ADAPTER).float()
    return total.to(weight.dtype)


def refuse_tied(model: nn.Module, name: str, layer: Any) -> None:
    """Raise if the weight of an adapted layer is another layer's too.

    Raises:
        ConfigError: It is, so merging would change that layer.
    """
    weight, own = layer.base_layer.weight, f"{name}.base_layer.weight"
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is weight and other != own:
            raise ConfigError(
                f"the adapter of {name} cannot be merged: its weight is tied to {other}, which would change too",
                hint="save the adapter instead, or untie the weights before training",
            )


def _require_adapters(model: nn.Module) -> dict[str, Any]:
    layers = adapted_layers(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no adapters", hint="apply lora first")
    return layers


def _config(model: nn.Module) -> Any:
    configs: Any = model.peft_config
    return configs[ADAPTER]

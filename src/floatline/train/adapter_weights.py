"""Checkpoints of a run with LoRA: the adapters in peft's format, not the base model.

    step-00000100/
      adapter_model.safetensors     adapters, and the modules of lora.train_also
      adapter_config.json           names the base model, by absolute path or hub id
      processor and tokenizer files
      trainer_state.pt              optimizer state, random numbers ... (weights.py)

transformers' and peft's `from_pretrained` load such a directory, with the base model it names. To resume, the base
model is loaded as at the start (the same files, in the same format), the techniques are applied, and then the adapters
are read: what was frozen is bit for bit what it was. A base model that has changed is refused (identity.py).

Under FSDP2 rank 0 writes the adapters gathered; they are small, so shards hold only optimizer state. Every rank reads
all of them and keeps its share, so the number of ranks may change.

Not covered: batch norms that are not frozen by `freezing` and not in lora.train_also. Their running statistics move and
are no adapter, so such runs are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.step import TrainStep
from floatline.techniques import Stack
from floatline.techniques.adapters.state import adapted_layers, adapter_state, load_adapter, save_adapter
from floatline.techniques.distributed.shards import full_tensor, is_sharded, reshard
from floatline.train.weights import PlainWeights, ShardedWeights


class AdapterWeights(PlainWeights):
    """The adapters of a model, and what is trained beside them."""

    def _write_files(self, directory: Path, whole: dict[str, torch.Tensor] | None) -> None:
        save_adapter(self.model, directory, base=base_of(self.model), state=whole)
        self.processor.save_pretrained(directory)

    def read(self, checkpoint: Path) -> None:
        load_adapter(self.model, checkpoint)

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        self.read(checkpoint)
        return super().resume(checkpoint)


class ShardedAdapterWeights(AdapterWeights, ShardedWeights):
    """The adapters of a model in shards: written by rank 0, optimizer state by every rank."""

    resume = ShardedWeights.resume

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def _gathered(self) -> dict[str, torch.Tensor]:
        reshard(self.model)
        whole = {key: full_tensor(value) for key, value in adapter_state(self.model).items()}
        return {key: value.cpu() for key, value in whole.items()} if self.ranks.rank == 0 else {}

    def read(self, checkpoint: Path) -> None:
        reshard(self.model)
        super().read(checkpoint)


def make_weights(step: TrainStep, processor: Any, load: Callable[[Path], nn.Module]) -> PlainWeights:
    """Return how the weights of a step's model are written and read.

    Raises:
        ConfigError: A LoRA run whose checkpoints could not hold all that changes.
    """
    model, ranks = step.model, step.ranks
    adapted = bool(adapted_layers(model))
    if adapted:
        _refuse_moving_statistics(model, step.stack)
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return (ShardedAdapterWeights if adapted else ShardedWeights)(model, processor, load, ranks)
    return (AdapterWeights if adapted else PlainWeights)(model, processor, load)


def base_of(model: nn.Module) -> str:
    """Return what a model was loaded from: the absolute path of its directory, or a hub id."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _refuse_moving_statistics(model: nn.Module, stack: Stack) -> None:
    """Raise if running statistics move that the adapters' files do not hold."""
    freezing: Any = next((applied for applied in stack.applied if applied.technique.name == "freezing"), None)
    still = freezing.touched if freezing and freezing.technique.batch_norm == "eval" else ()
    held = adapter_state(model)
    for name, module in model.named_modules():
        moves = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        frozen = any(name == tower or name.startswith(f"{tower}.") for tower in still)
        if moves and not frozen and f"base_model.model.{name}.running_mean" not in held:
            raise ConfigError(
                f"{name} is a batch norm whose running statistics change in training; adapters do not hold them",
                hint=f"name it in techniques.lora.train_also, or in techniques.freezing.modules: {name}",
            )

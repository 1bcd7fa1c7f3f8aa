"""How a model's weights, and the state that is laid out like them, get into a checkpoint and out again.

Every checkpoint is a Hugging Face directory, whatever the training did to the model. `PlainWeights` is that and nothing
else; of a model with LoRA adapters it is peft's directory (adapter_weights.py). `ShardedWeights` (of a model under
FSDP2) also writes each rank's shards of weights and optimizer state, side by side, by torch.distributed.checkpoint:

    step-00000100/
      model.safetensors, config.json, ...   the whole model, gathered and written by rank 0
      shards/.metadata, shards/__0_0.distcp, shards/__1_0.distcp, ...
      trainer_state.pt                      the rest; where a tensor lies in shards/, its key stands there

Shards know which part of a tensor they are, so they are read back on any number of ranks, and by a run that does not
shard at all; a plain checkpoint is read into shards likewise. Low-bit optimizer state, whose blocks lie otherwise on
another number of ranks, goes into shards as fp32: a resume quantises it anew, so it is not exact to the bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floatline.techniques import OneRank
from floatline.techniques.distributed.shards import dequantised, full_tensor, is_sharded, laid_out_like, reshard
from floatline.train.checkpoint import load_state

SHARDS = "shards"
_KEY = "in_shards"


class PlainWeights:
    """A model's weights as they are.

    Args:
        model: Of transformers, or with its `save_pretrained`.
        processor: Saved beside it.
        load: Reads a model directory into a new model in the format that this run saves.
    """

    ranks = OneRank()

    def __init__(self, model: nn.Module, processor: Any, load: Callable[[Path], nn.Module]) -> None:
        self.model = model
        self.processor = processor
        self.load = load

    def split(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return what goes into trainer_state.pt, and the tensors that go into shards."""
        return state, {}

    def write(self, directory: Path, shards: dict[str, torch.Tensor]) -> None:
        """Write the model's files, and the shards that `split` returned. Every rank calls it."""
        self._write_files(directory, None)

    def _write_files(self, directory: Path, whole: dict[str, torch.Tensor] | None) -> None:
        """Write what a user loads; `whole` are the tensors where they had to be gathered."""
        self.model.save_pretrained(directory, state_dict=whole)  # type: ignore[operator]
        self.processor.save_pretrained(directory)

    def read(self, checkpoint: Path) -> None:
        """Put a checkpoint's weights into the model."""
        self.model.load_state_dict(self.load(checkpoint).state_dict())

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        """Return a checkpoint's trainer state; the model was loaded from the checkpoint already."""
        state = load_state(checkpoint)
        keys = _keys_in(state)
        return _filled(state, _read_shards(checkpoint, keys, _whole, OneRank())) if keys else state


class ShardedWeights(PlainWeights):
    """The weights of a model in shards; all ranks write and read their own."""

    def __init__(self, model: nn.Module, processor: Any, load: Callable[[Path], nn.Module], ranks: OneRank) -> None:
        super().__init__(model, processor, load)
        self.ranks = ranks

    def split(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        shards: dict[str, torch.Tensor] = {}
        return _emptied(state, "state", shards), shards

    def write(self, directory: Path, shards: dict[str, torch.Tensor]) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(directory / SHARDS)
        _run(lambda: dcp.save(shards | self._model_tensors(), storage_writer=writer, **_group(self.ranks)))
        whole = self._gathered()
        self.ranks.on_first(lambda: self._write_files(directory, whole))

    def _gathered(self) -> dict[str, torch.Tensor]:
        """Return the whole model on the CPU, on rank 0; every other rank helps and keeps nothing."""
        tensors: dict[str, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}
        reshard(self.model)
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in self.model.state_dict().items():
            source = own.get(name, value)
            if id(source) not in seen:
                whole = full_tensor(source.detach())
                seen[id(source)] = whole.cpu() if self.ranks.rank == 0 else whole.new_empty(0)
            tensors[name] = seen[id(source)]
        return tensors

    def _model_tensors(self) -> dict[str, torch.Tensor]:
        """Return the model's parameters, tied ones once, and saved buffers, under their keys in the shards."""
        reshard(self.model)
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        known = set(dict(self.model.named_parameters(remove_duplicate=False)))
        buffers = {name: value for name, value in self.model.state_dict().items() if name not in known}
        return {f"model.{name}": value for name, value in (parameters | buffers).items()}

    @torch.no_grad()
    def read(self, checkpoint: Path) -> None:
        targets = self._model_tensors()
        if (checkpoint / SHARDS).is_dir():
            _load_into(targets, checkpoint, self.ranks)
            return
        whole = self.load(checkpoint).state_dict()  # of a run that did not shard then
        for key, target in targets.items():
            target.copy_(laid_out_like(whole[key.removeprefix("model.")].to(target.dtype), target))

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        self.read(checkpoint)
        state = load_state(checkpoint)
        keys = _keys_in(state)
        mesh = next(p for p in self.model.parameters() if is_sharded(p)).device_mesh  # type: ignore[attr-defined]

        def in_shards(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            from torch.distributed.tensor import Shard, zeros

            return zeros(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])

        return _filled(state, _read_shards(checkpoint, keys, in_shards, self.ranks)) if keys else state


def _whole(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype)


def _emptied(tree: Any, path: str, shards: dict[str, torch.Tensor]) -> Any:
    """Return `tree` with every tensor in shards replaced by its key, and put it into `shards` under that."""
    if isinstance(tree, dict):
        return {key: _emptied(value, f"{path}.{key}", shards) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_emptied(value, f"{path}.{index}", shards) for index, value in enumerate(tree))
    if isinstance(tree, torch.Tensor) and is_sharded(tree):
        shards[path] = dequantised(tree.detach())
        return {_KEY: path}
    return tree


def _keys_in(tree: Any) -> list[str]:
    """Return the keys that `_emptied` left in a tree."""
    if isinstance(tree, dict):
        if tree.keys() == {_KEY}:
            return [tree[_KEY]]
        tree = list(tree.values())
    return [key for value in tree for key in _keys_in(value)] if isinstance(tree, list | tuple) else []


def _filled(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Put tensors where their keys are."""
    if isinstance(tree, dict):
        if tree.keys() == {_KEY}:
            return tensors[tree[_KEY]]
        return {key: _filled(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_filled(value, tensors) for value in tree)
    return tree


def _read_shards(
    checkpoint: Path, keys: list[str], make: Callable[[torch.Size, torch.dtype], torch.Tensor], ranks: OneRank
) -> dict[str, torch.Tensor]:
    """Return tensors out of a checkpoint's shards, in the layout that `make` gives them."""
    import torch.distributed.checkpoint as dcp

    known: Any = dcp.FileSystemReader(checkpoint / SHARDS).read_metadata().state_dict_metadata
    tensors = {key: make(known[key].size, known[key].properties.dtype) for key in keys}
    _load_into(tensors, checkpoint, ranks)
    return tensors


def _load_into(tensors: dict[str, torch.Tensor], checkpoint: Path, ranks: OneRank) -> None:
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint / SHARDS)
    _run(lambda: dcp.load(tensors, storage_reader=reader, **_group(ranks)))


def _group(ranks: OneRank) -> dict[str, Any]:
    """Return which ranks take part, for torch.distributed.checkpoint."""
    group = getattr(ranks, "group", None)
    return {"no_dist": True} if group is None else {"process_group": group}


def _run(action: Callable[[], Any]) -> None:
    """Run a save or load; torch wraps the ranks' errors into a BaseException, which is opened here."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():  # it warns that it takes a single process for one
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            action()
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first if isinstance(first, Exception) else RuntimeError(str(error)) from error

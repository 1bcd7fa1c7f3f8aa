"""Take FSDP2 off a model again, which torch has no function for.

`fully_shard` swaps the class of each module, puts attributes and hooks on it (some only in the first forward) and
replaces its parameters by shards. `Trace` remembers what was there before and puts it back.

Not covered: models that somebody else's `fully_shard` was applied to before; torch refuses to shard those twice.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from floatline.techniques.distributed.shards import full_tensor, reshard


class Trace:
    """What a model looked like before `fully_shard`, to take it off again exactly.

    The model's own Parameter objects are kept, without their memory, and get the gathered values on undo.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.classes = [type(module) for module in self.modules]
        self.attributes = [tuple(vars(module)) for module in self.modules]
        self.parameters = [dict(module._parameters) for module in self.modules]

    def free_originals(self) -> None:
        """Let go of the whole weights; shape, format and identity of each Parameter stay."""
        for parameter in {p for own in self.parameters for p in own.values() if p is not None}:
            if parameter.dim():
                parameter.data = parameter.data.new_empty(()).expand(parameter.shape)

    def undo(self) -> None:
        """Put the model's own parameters, with their present values, and classes back; take FSDP's hooks off."""
        values = self._gathered()
        for module, kind, before, own in zip(self.modules, self.classes, self.attributes, self.parameters, strict=True):
            module.__class__ = kind
            for key in set(vars(module)).difference(before):
                if key.startswith(("__composable_api", "_is_fsdp_managed", "_fsdp_use_orig")):
                    del vars(module)[key]
            _remove_hooks(module)
            _forget_state(module)
            for key, parameter in own.items():
                if parameter is not None and id(parameter) in values:
                    parameter.data = values[id(parameter)]
                module._parameters[key] = parameter

    def _gathered(self) -> dict[int, torch.Tensor]:
        """Return the present value of each of the model's own parameters, by its id."""
        values: dict[int, torch.Tensor] = {}
        reshard(self.modules[0])
        for module, own in zip(self.modules, self.parameters, strict=True):
            for key, parameter in own.items():
                now = module._parameters[key]
                if parameter is not None and now is not None and now is not parameter and id(parameter) not in values:
                    values[id(parameter)] = full_tensor(now.detach()).to(parameter.device).clone()
        return values


def _remove_hooks(module: nn.Module) -> None:
    """Remove FSDP's hooks, which its lazy initialisation adds too, and leave everybody else's."""
    tables = [value for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict)]
    mine = {number for table in tables for number, hook in table.items() if _is_fsdp(hook)}
    for table in tables:
        for number in mine & set(table):
            del table[number]


def _is_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # load_state_dict's hooks are wrapped
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")


def _forget_state(module: nn.Module) -> None:
    """Take a module out of torch's table of sharded modules, which would refuse it a second time."""
    with suppress(ImportError, KeyError):
        from torch.distributed._composable_state import _module_state_mapping

        del _module_state_mapping[module]

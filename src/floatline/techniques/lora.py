"""LoRA: small trainable matrices beside frozen layers; gradients and optimizer state are those of a few weights.

    y = W x + s B A x,    A (rank, in) random, B (out, rank) = 0,    s = alpha / rank, or alpha / sqrt(rank) for rslora

At first B A = 0, so the adapted model gives the base model's outputs bit for bit. Everything else is frozen, except
what `train_also` names. The layers are peft's own (`inject_adapter_in_model`), put where patterns say and taken
off again. What is saved is peft's format (adapters/state.py).

Adapters are fp32, over a base in bf16 or fp16 too: then the base may be loaded in half precision under `bf16-mixed` and
`16-mixed`, and there is no fp16 gradient that GradScaler could refuse (transformers#30559). The `-true` policies cast
adapters like all weights. Weights that `train_also` unfreezes must be fp32 under a `-mixed` policy, as everywhere.

Without `targets` these are the projections of attention; in a model that has no attention modules of its own, the
Linear layers of its repeated layers. What `freezing` froze is left out, for a frozen tower stays frozen. Layers inside
`nn.MultiheadAttention` cannot be adapted: it reads their weights without calling them. The fused inference path of
`nn.TransformerEncoderLayer` does so too and is switched off where its layers are adapted.

Not covered: DoRA and other variants; a tied weight that is adapted can be trained and saved, but not merged.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.techniques.adapters.state import ADAPTER, accept_plain_weights, adapted_layers
from floatline.techniques.adapters.targets import is_transposed_linear, matched_layers, usual_targets
from floatline.techniques.base import MARK, Applied, Stage, Technique
from floatline.techniques.freezing import select_parameters
from floatline.techniques.layers import outermost
from floatline.techniques.placement import fakes_change_in_place, holds_fakes


@dataclass(frozen=True, kw_only=True)
class Lora(Technique):
    """Train low-rank adapters of some layers and freeze the rest.

    Args:
        targets: Layers to adapt: patterns (`model.language_model.layers.*.mlp.*_proj`), or bare last names anywhere
            (`q_proj`). Empty takes the projections of attention.
        rank: Inner dimension of an adapter.
        alpha: Scale of its output, over the rank; None is twice the rank.
        dropout: Of the adapter's input, in training.
        rslora: Divide alpha by the root of the rank, so that large ranks learn as fast.
        train_also: Names or patterns of modules or parameters that are trained themselves (a merger, norms).

    Raises:
        ConfigError: A rank below 1, a dropout outside 0 to 1, or peft is missing.

    Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rslora).
    """

    name = "lora"
    stage = Stage.ADAPT

    targets: tuple[str, ...] = ()
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    train_also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("rank", 1)
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise self.bad("alpha", "give a positive number, or leave it out for twice the rank")
        if not 0 <= self.dropout < 1:
            raise self.bad("dropout", "give 0 or more and less than 1")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        if hasattr(model, "peft_config"):
            raise ConfigError(
                f"{type(model).__name__} carries adapters of peft already", hint="pass the base model, without them"
            )
        frozen = _frozen_by_technique(model)
        targets, notes = self._find_targets(model, frozen)
        also = select_parameters(model, self.train_also, setting="lora.train_also")
        self._refuse_overlaps(targets, also, frozen)
        _refuse_tied(model, also)
        if not targets:
            return Applied(technique=self, touched=(), notes=notes)
        restore = _record(model, targets)
        try:
            _inject(model, targets, self._config(model, targets, also))
        except BaseException:
            restore()
            raise
        for parameter in also.values():
            parameter.requires_grad_(True)
        size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return Applied(
            technique=self,
            touched=(*targets, *also),
            undo=restore,
            notes=notes,
            facts=lambda: {"parameters": float(size)},
        )

    def _config(self, model: nn.Module, targets: dict[str, nn.Module], also: dict[str, nn.Parameter]) -> Any:
        """Return peft's config of the adapters, as it is saved with them."""
        return _peft().LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            target_modules="|".join(map(re.escape, targets)),  # a text is a pattern of whole names
            modules_to_save=_modules_of(model, also) or None,
            base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        )

    def _find_targets(self, model: nn.Module, frozen: set[int]) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
        notes = []
        if self.targets:
            found = {
                name: module for pattern in self.targets for name, module in matched_layers(model, pattern).items()
            }
        else:
            found, note = usual_targets(model)
            notes.append(note)
        free = {name: module for name, module in found.items() if not any(id(p) in frozen for p in module.parameters())}
        if found and not free:
            raise ConfigError(
                f"lora: all {len(found)} targets ({next(iter(found))} ...) are frozen by freezing",
                hint="drop freezing, lora freezes all that it does not adapt; or name other targets",
            )
        if len(free) < len(found):
            notes.append(f"{len(found) - len(free)} layers that freezing froze are not adapted")
        return free, tuple(notes)

    def _refuse_overlaps(self, targets: dict[str, nn.Module], also: dict[str, nn.Parameter], frozen: set[int]) -> None:
        for name, parameter in also.items():
            if id(parameter) in frozen:
                raise ConfigError(
                    f"lora.train_also names {name}, which freezing froze", hint=f"add it to freezing.keep: {name}"
                )
            if "." not in name:
                raise ConfigError(
                    f"lora.train_also names {name}, a parameter of the model itself, which peft's format cannot hold",
                    hint="name modules, or parameters of modules",
                )
            module = name.rpartition(".")[0]
            if module in targets:
                raise ConfigError(
                    f"lora.train_also names {name}, which is in a layer that gets an adapter",
                    hint="leave the layer out of lora.targets, or out of lora.train_also",
                )
            inside = next((target for target in targets if target.startswith(f"{module}.")), None)
            if inside:
                raise ConfigError(
                    f"lora.train_also names {name}, but peft's format keeps {module} whole or not at all, and {inside} "
                    "in it gets an adapter",
                    hint="leave one of them out of lora.train_also or lora.targets",
                )


def _modules_of(model: nn.Module, also: dict[str, nn.Parameter]) -> list[str]:
    """Return the modules that hold parameters, in peft's terms: each with all that is in it."""
    names = sorted({name.rpartition(".")[0] for name in also})
    return list(outermost({name: model.get_submodule(name) for name in names}))


def _refuse_tied(model: nn.Module, also: dict[str, nn.Parameter]) -> None:
    names = {id(parameter): name for name, parameter in also.items()}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        name = names.get(id(parameter), other)
        if name != other:
            raise ConfigError(
                f"lora.train_also names {name}, which is tied to {other}: in peft's format they would come apart",
                hint="leave it out, or give the layer an adapter: name it in lora.targets",
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(
            "lora needs peft, which is not installed", hint='pip install "floatline[techniques]"'
        ) from None
    return peft


def _frozen_by_technique(model: nn.Module) -> set[int]:
    freezing: Any = getattr(model, MARK, {}).get("freezing")
    return {id(parameter) for parameter in freezing.names(model).values()} if freezing else set()


def _inject(model: nn.Module, targets: dict[str, nn.Module], config: Any) -> None:
    modules_to_save, config.modules_to_save = config.modules_to_save, None  # peft would train copies of them
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # peft sets it itself, for each layer
        try:
            with fakes_change_in_place() if holds_fakes(model) else nullcontext():
                _peft().inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        except (ValueError, TypeError, RuntimeError) as error:  # peft's own rules of what it can adapt
            raise ConfigError(f"peft cannot adapt these layers: {error}", hint="set lora.targets to others") from error
    layers = adapted_layers(model)
    if layers.keys() != targets.keys():
        raise ConfigError(
            f"peft adapted {sorted(layers)[:3]} ... instead of {sorted(targets)[:3]} ...", hint="set lora.targets"
        )
    config.modules_to_save = modules_to_save
    config.fan_in_fan_out = any(map(is_transposed_linear, targets.values()))
    for name, layer in layers.items():
        layer.train(targets[name].training)
        for key, parameter in layer.named_parameters():
            if key.startswith("lora_") and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        accept_plain_weights(layer)
    for part in _fused_in_evaluation(model, tuple(targets)):
        part.activation_relu_or_gelu = 0


def _fused_in_evaluation(model: nn.Module, targets: tuple[str, ...]) -> list[Any]:
    """Return the encoder layers that would read the targets' weights without calling them; 0 means "not fusable"."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer) and any(target.startswith(f"{name}.") for target in targets)
    ]


def _record(model: nn.Module, targets: dict[str, nn.Module]) -> Callable[[], None]:
    """Return a function that puts modules, trainability and attributes back as they are now."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fused = [(part, part.activation_relu_or_gelu) for part in _fused_in_evaluation(model, tuple(targets))]

    def restore() -> None:
        for name, module in targets.items():
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = module
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, value in fused:
            part.activation_relu_or_gelu = value
        model.__dict__.pop("peft_config", None)

    return restore

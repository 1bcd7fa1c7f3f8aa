"""Build a transformers model from its config: for real, on the meta device, or under fake tensors.

Under a fake mode the weights are not initialised: there is nothing to initialise, and some initialisers read
values back (a truncated normal looks at its bounds). For real they are, so that a run on a plan's workload trains.
Weights of a checkpoint are never read.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from floatline.errors import ModelError
from floatline.plan.inputs.layout import real
from floatline.plan.positions import text_config

LAYER_DROP = frozenset({"layerdrop", "encoder_layerdrop", "decoder_layerdrop"})
"""Keys of the chance that a layer is skipped in an update. A plan counts the update in which none is."""


def model_factory(
    cls: Any, config: Any, dtype: torch.dtype, *, attention: str | None = None, cache: bool = False
) -> Callable[[], nn.Module]:
    """Return a factory of the model that `config` describes.

    No layer is skipped at random (layer drop), so that the largest update is the one that is planned.

    Args:
        cls: A transformers model class.
        config: Its config; each model gets a copy of its own.
        dtype: Format of the weights.
        attention: transformers' `attn_implementation`; None leaves the choice to transformers.
        cache: Leave the cache of keys and values as the config has it; else it is off.

    Raises:
        ModelError: By the factory, where the config contradicts itself or the class needs a package.
    """

    given: dict[str, Any] = {"attention": attention, "cache": cache}

    def build() -> nn.Module:
        return _without_values(cls, config, dtype, **given) if faked() else _plain(cls, config, dtype, **given)

    return build


def on_meta(cls: Any, config: Any) -> nn.Module:
    """Return the model on the meta device: shapes without memory, also inside a fake mode."""
    with real(), torch.device("meta"):
        return _plain(cls, config, torch.float32)


def count_parameters(cls: Any, config: Any) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in on_meta(cls, config).parameters())


def drops_layers(config: Any) -> bool:
    """Say whether training a config skips layers at random."""
    return any(getattr(config, key, 0.0) > 0 for key in LAYER_DROP)


def faked() -> bool:
    """Say whether a tensor made now would be fake; it asks for 4 MiB that nothing ever touches."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(torch.empty(1 << 20), FakeTensor)


def config_to_build(cls: Any, config: Any, *, cache: bool = False) -> Any:
    """Return a copy of a config as a model is built from it: no layer drop, no cache of keys and values, all ids there.

    Args:
        cls: A transformers model class.
        config: Its config.
        cache: Leave the cache as the config has it.
    """
    own = deepcopy(config)
    for part in () if cache else (own, text_config(own)):
        part.use_cache = False
    for key in LAYER_DROP & set(vars(own)):
        setattr(own, key, 0.0)
    _fill_tokens(own, cls)
    return own


def _plain(cls: Any, config: Any, dtype: torch.dtype, attention: str | None = None, cache: bool = False) -> nn.Module:
    own = config_to_build(cls, config, cache=cache)
    try:
        kernel = {} if attention is None else {"attn_implementation": attention}
        model: nn.Module = cls._from_config(own, dtype=dtype, **kernel)
    except (ImportError, TypeError, ValueError, AttributeError, KeyError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"{cls.__name__} cannot be built from its config: {said.strip()}",
            hint="check the config against a published one" if not isinstance(error, ImportError) else "install it",
        ) from error
    return model.train()


def _without_values(cls: Any, config: Any, dtype: torch.dtype, **given: Any) -> nn.Module:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model: Any = _plain(cls, config, dtype, **given)
    model.tie_weights()  # transformers ties where it initialises, so skipping one skips the other
    return model


def _fill_tokens(config: Any, cls: Any) -> None:
    """Give a config the ids that a forward asks for and some checkpoints keep elsewhere; any id weighs the same."""
    padding = getattr(config, "pad_token_id", None)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = padding or 0
    if cls.__name__.endswith("ForSequenceClassification") and padding is None:
        text_config(config).pad_token_id = text_config(config).vocab_size - 1

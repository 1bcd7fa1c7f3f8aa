"""Say whether a model can be trained on packed rows, and why not.

transformers tells packed samples apart by `position_ids` that start again (masking_utils), but only in models that
hand theirs to the function that builds the mask. Nothing in a model's interface says whether it does, and a probe
cannot run in a model whose weights do not exist yet (the planner's). So the forward functions are read: one of them
must build a causal mask and name `position_ids` in that call. Tests hold this against real outputs.

Not covered: models with a mask of their own making; they are refused.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from floatline.techniques.batches.tokens import is_transformers, transformers_model

HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
ATTENTION_LAYERS = {"full_attention", "attention", "sliding_attention", "chunked_attention"}
RECURRENT = ("Mamba", "Rwkv", "RWKV", "Recurrent", "DeltaNet", "ShortConv", "LightningAttention", "LinearAttention")


def why_not_packable(model: nn.Module) -> str | None:
    """Return why samples cannot share a row in `model`; None where they can."""
    inner = transformers_model(model)
    kind = type(model if inner is None else inner).__name__
    if inner is None:
        return f"{kind} is no transformers model, nothing would keep the samples of a row apart"
    config: Any = inner.config
    if getattr(config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder, packing is for decoders"
    if not kind.endswith(HEADS):
        return f"{kind} has no language-model head, packing lays out next-token targets"
    if (layer := _recurrent_layer(inner)) is not None:
        return f"{kind} has {layer} layers, whose state runs from one sample of a row into the next"
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return f"{kind} takes no position_ids, so it cannot tell the samples of a row apart"
    kinds = {type(module) for module in inner.modules() if is_transformers(module)}
    if not any(map(_masks_by_position, kinds)):
        return f"{kind} does not build its attention mask from position_ids, samples of a row would see each other"
    three_dimensional = any(hasattr(module, "get_rope_index") for module in inner.modules())
    if three_dimensional and not any("shape[0] == 4" in (_source(one) or "") for one in kinds):
        return f"{kind} takes no plain positions beside its three-dimensional ones"
    return None


def _recurrent_layer(model: nn.Module) -> str | None:
    """Return what kind of layer carries a state along the row; None where all is attention."""
    for module in model.modules():
        kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
        other = next((kind for kind in kinds if kind not in ATTENTION_LAYERS), None)
        if other is not None:
            return str(other)
        if any(word in type(module).__name__ for word in RECURRENT):
            return type(module).__name__
    return None


def _source(kind: type[nn.Module]) -> str | None:
    """Return the text of a class's forward; None where there is no source file."""
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):
        return None


def _masks_by_position(kind: type[nn.Module]) -> bool:
    """Say whether a class's forward builds a causal mask from `position_ids`, in a call or a dict of arguments."""
    source = _source(kind)
    if source is None or "causal_mask" not in source:
        return False
    needed = {"attention_mask", "position_ids"}
    return any(needed <= names and names & {"inputs_embeds", "input_embeds"} for names in _argument_names(source))


def _argument_names(source: str) -> Iterator[set[str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and "mask" in ast.unparse(node.func):
            yield {keyword.arg for keyword in node.keywords if keyword.arg}
        elif isinstance(node, ast.Dict):
            yield {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}

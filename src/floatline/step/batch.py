"""What a batch is: how it is handed to a model, moved to a device, and how much it weighs.

A batch is a dict (`model(**batch)`), a tuple (`model(*batch)`) or a tensor (`model(batch)`); a list of batches is a
list of micro-batches of one update.

A micro-batch's loss is a mean over its targets. For the sum of micro-batches to equal the full batch, each mean must
count in proportion to its number of targets, not 1/N: with N micro-batches of n_i targets

    loss = sum_i (n_i / sum_j n_j) * loss_i

(transformers#34191). `target_count` says what n_i is for a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from floatline.errors import ConfigError, ModelError

Batch = Any
LossFunction = Callable[[nn.Module, Any], torch.Tensor]

IGNORED = -100
"""Label that cross-entropy leaves out, torch's default `ignore_index`."""


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Run `model` on a batch: dict as keywords, tuple as positions, a tensor as the one argument.

    Raises:
        ConfigError: It is none of these.
    """
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    if isinstance(batch, torch.Tensor):
        return model(batch)
    if hasattr(batch, "items"):  # transformers' BatchEncoding and other mappings
        return model(**dict(batch.items()))
    raise ConfigError(
        f"a batch must be a dict, a tuple or a tensor, not {type(batch).__name__}",
        hint="a list means micro-batches of one update",
    )


def default_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return `output.loss`, `output["loss"]` or the output itself when it is a scalar.

    Raises:
        ModelError: The output holds no loss.
    """
    output = call_model(model, batch)
    loss = output["loss"] if isinstance(output, dict) and "loss" in output else getattr(output, "loss", output)
    hint = "put labels into the batch, or pass loss=(model, batch) -> scalar"
    return scalar(loss, type(model).__name__, hint)


def scalar(loss: Any, source: str = "the loss function", hint: str = "return one number: the mean over targets") -> Any:
    """Return a loss as a 0-d tensor.

    Args:
        loss: What `source` returned.
        source: Who returned it, for the error.
        hint: What to do about it.

    Raises:
        ModelError: It is no tensor of one element, or has no gradient where gradients are on.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ModelError(
                f"the loss of {source} depends on no trainable parameter",
                hint="look for detach() and no_grad() on the way to it, and for layers that are frozen",
            )
        return loss.reshape(())
    raise ModelError(f"{source} returned {_describe(loss)}, not a scalar loss", hint=hint)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def move(batch: Batch, device: torch.device) -> Batch:
    """Return `batch` with its tensors on `device`; nothing is copied when they are there."""

    def to_device(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.device != device:
            return leaf.to(device, non_blocking=device.type == "cuda")
        return leaf

    return tree_map(to_device, dict(batch.items()) if hasattr(batch, "items") else batch)


def target_count(model: nn.Module, batch: Batch) -> torch.Tensor | int:
    """Return the number of targets that the loss of `batch` is a mean over.

    With integer `labels` of two or more dimensions these are the labels that are not -100; for models that predict
    the next token (transformers' causal and vision-language losses shift the labels by one) the first of each row does
    not count. Otherwise it is the number of samples: the length of the first tensor.

    Returns:
        A 0-d int64 tensor on the labels' device, or an int.
    """
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if isinstance(labels, torch.Tensor) and not labels.is_floating_point():
        counted = labels[..., 1:] if labels.dim() > 1 and predicts_next_token(model) else labels
        return (counted != IGNORED).sum()
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    return 1 if first is None else first.shape[0]


def predicts_next_token(model: nn.Module) -> bool:
    """Say whether a transformers model shifts its labels inside: causal language models and their multimodal kin.

    transformers names the loss in `loss_type`, except for older classes (GPT2LMHeadModel), where it falls back to the
    causal loss. Wrappers (DistributedDataParallel, torch.compile) are looked through.
    """
    while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
        model = inner
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type is None:
        return hasattr(model, "loss_function") and "LMHead" in type(model).__name__
    return loss_type in {"ForCausalLM", "ForConditionalGeneration"}

"""The copy of a model that is audited: fp32, in evaluation mode, without gradients.

Normalisation and recurrent layers keep the mode they had: running averages are audited too, and cuDNN's layers have no
backward in evaluation mode.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from floatline.audit.model_state import tensors_held
from floatline.errors import ModelError

_KEEP_MODE = (nn.modules.batchnorm._BatchNorm, nn.RNNBase)


def copied(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the copy, and notes on it.

    Raises:
        ModelError: It cannot be copied, or has no floating parameters with values.
    """
    notes = []
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if not floats:
        raise ModelError(
            f"{type(model).__name__} has no floating-point parameters: there is no precision to audit",
            hint="audit_function(fn, inputs) audits plain functions of tensors",
        )
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ModelError(
            f"{type(model).__name__} has lazy parameters without a shape", hint="run it on a batch once before"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} holds TorchScript, which no hook can look into",
            hint="audit the Python module that it was made of",
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError(f"{type(model).__name__} is on the meta device", hint="give it weights: precision is theirs")
    try:
        made = copy.deepcopy(model, _without_graphs(model))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {error}", hint="audit a freshly built model"
        ) from error
    halves = {str(p.dtype).removeprefix("torch.") for p in floats if p.element_size() < 4}
    if halves:
        notes.append(f"the weights are {', '.join(sorted(halves))}: what they lost before is not seen")
    made.float()
    for module in made.modules():
        module.training = module.training and isinstance(module, _KEEP_MODE)
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            module.sparse = False  # the same gradient, of which every element has a shadow
    for parameter in made.parameters():
        parameter.grad = None
    return made, notes


def _without_graphs(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return stand-ins for what an earlier forward has left in attributes with its graph, which cannot be copied."""
    held = [tensor for module in model.modules() for tensor in tensors_held(module)]
    return {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}

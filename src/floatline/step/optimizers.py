"""Which parameters an optimizer steps, when techniques have changed them under it.

Adapters add parameters, sharding replaces each by its shard, freezing takes some away. A factory
`callable(params) -> Optimizer` is called when all that has happened. An optimizer that exists already is rebound: what
was replaced is found again by its name, what is frozen now is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.techniques.distributed.shards import laid_out_like
from floatline.techniques.optim_steps.low_bit_adam import LowBitAdam
from floatline.techniques.optim_steps.low_bit_state import plain_state
from floatline.techniques.optim_steps.wrapped import innermost

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the dotted name of each parameter by its id."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def make_optimizer(
    optimizer: torch.optim.Optimizer | OptimizerFactory, model: nn.Module, before: dict[int, str]
) -> torch.optim.Optimizer:
    """Return the optimizer over the model's trainable parameters as they are now.

    Args:
        optimizer: A factory, or an optimizer made before the techniques were applied.
        model: With the techniques on it.
        before: Names by id, as `names_of` gave them before.

    Raises:
        ConfigError: An existing optimizer lacks parameters that a technique has added; a factory returns none, or one
            that wants to run the model itself.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(optimizer, torch.optim.Optimizer):
        return _steps_alone(optimizer(trainable))
    rebind(optimizer, before, model)
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    added = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in known and id(p) not in before]
    if added:
        raise ConfigError(
            f"{len(added)} parameters that a technique added are not in the optimizer, first {added[0]}",
            hint="pass optimizer=lambda params: torch.optim.AdamW(params, ...) instead of an optimizer",
        )
    return optimizer


def _steps_alone(optimizer: Any) -> torch.optim.Optimizer:
    """Refuse what is no optimizer, and one whose step needs a closure (LBFGS)."""
    if not hasattr(optimizer, "param_groups"):
        raise ConfigError(
            f"the optimizer factory returned a {type(optimizer).__name__}", hint="return a torch.optim.Optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS runs the model several times in one step, which TrainStep does not do",
            hint="take an optimizer whose step() needs no closure",
        )
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, whichever techniques it was saved with.

    Low-bit state becomes fp32 for a plain optimizer; tensors are put into shards or taken out of them.
    """
    state = state if isinstance(innermost(optimizer), LowBitAdam) else plain_state(state)
    optimizer.load_state_dict(laid_out_state(state, optimizer))


def rebind(optimizer: torch.optim.Optimizer, before: dict[int, str], model: nn.Module) -> None:
    """Give an optimizer the model's present parameters for those it had, in place; frozen ones are dropped."""
    now = dict(model.named_parameters())
    present = {id(parameter) for parameter in now.values()}
    for group in optimizer.param_groups:
        group["params"] = [_successor(p, before, now, present, optimizer) for p in group["params"]]
        group["params"] = [p for p in group["params"] if p.requires_grad or id(p) not in before]


def _successor(
    parameter: torch.Tensor,
    before: dict[int, str],
    now: dict[str, nn.Parameter],
    present: set[int],
    optimizer: torch.optim.Optimizer,
) -> torch.Tensor:
    replaced = now.get(before.get(id(parameter), ""))
    if id(parameter) in present or replaced is None:
        return parameter
    if parameter in optimizer.state and replaced.shape == parameter.shape:
        optimizer.state[replaced] = _laid_out(optimizer.state.pop(parameter), replaced)
    return replaced


def laid_out_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict with its tensors in the layout of the parameters they belong to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(saved.get("state", ())) > len(parameters) or not all(isinstance(i, int) for i in saved.get("state", ())):
        return saved  # not in torch's own form
    state = {index: _laid_out(values, parameters[index]) for index, values in saved["state"].items()}
    return {**saved, "state": state}


def _laid_out(state: dict[str, Any], parameter: torch.Tensor) -> dict[str, Any]:
    """Return a parameter's state in the layout that the parameter now has: in shards, or whole."""
    return {
        key: laid_out_like(value, parameter)
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        else value
        for key, value in state.items()
    }

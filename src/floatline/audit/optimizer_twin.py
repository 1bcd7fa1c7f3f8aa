"""An optimizer's twin: the same class and settings on cut-outs of the parameters, in another number format.

The twin is the optimizer's own object copied, so its step is the step of the training run, whichever optimizer it is.
Its groups hold cut-outs (some elements of each parameter) and its state is cut likewise; hooks and learning-rate
schedules stay behind. The optimizer it comes from is read, never changed.

A cut-out stands for its parameter only if the optimizer treats elements one by one. That is measured on a small
tensor, not looked up in a list: whether some of its elements, stepped alone, move as they do among the others. Adam,
SGD, RMSprop, Adagrad, Lion do; Muon and Adafactor do not, and get whole parameters.

State that has the parameter's own format follows the twin's format; state in another one (fp32 moments over bf16
weights) keeps it.

Not covered: optimizers whose step needs a closure (LBFGS); state quantised in blocks (8-bit Adam).
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from floatline.techniques.optim_steps.wide_step import COMPENSATION, MASTER, is_narrow

LEAST = 512
"""Elements of a cut, if need be the same ones again."""
_LEFT_BEHIND = ("step", "zero_grad")
"""Methods that schedulers and others put over an instance's own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """The elements of one parameter that are looked at.

    Args:
        name: The parameter's dotted name.
        parameter: Itself, or what stands for it in the optimizer.
        index: Flat indices, 1-d; None takes all.
    """

    name: str
    parameter: torch.Tensor
    index: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of these elements of a tensor of the parameter's shape, with as many dimensions.

        Optimizers and those who make their groups tell matrices from vectors, so a cut of a matrix is (k, 1).
        """
        if self.index is None:
            return tensor.detach().clone()
        return tensor.detach().reshape(-1)[self.index].reshape(-1, *[1] * max(0, tensor.dim() - 1))


def cut_of(name: str, parameter: torch.Tensor, size: int, generator: torch.Generator) -> Cut:
    """Choose up to `size` elements of a parameter at random.

    A small parameter is taken several times over: each copy has noise and random rounding of its own, and where few
    updates come through at random, few elements say nothing.
    """
    elements = parameter.numel()
    if elements > size:
        index = torch.randint(elements, (size,), generator=generator).sort().values
    else:
        index = torch.arange(elements).repeat(max(1, LEAST // elements))
    return Cut(name=name, parameter=parameter, index=index.to(parameter.device))


@dataclass(eq=False)
class Twin:
    """An optimizer over cut-outs.

    Attributes:
        optimizer: The copy.
        weights: One parameter for each cut, in order.
    """

    optimizer: torch.optim.Optimizer
    weights: list[torch.Tensor]

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Step once with these gradients, cast to the weights' format."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient.to(weight.dtype)
        self.optimizer.step()

    def carried(self, index: int) -> torch.Tensor:
        """Return a weight with what a master copy or Kahan summation keeps of it, which the next updates get back."""
        weight, compensation = self.weights[index].detach(), self.state(index, COMPENSATION)
        if (master := self.state(index, MASTER)) is not None:
            return master
        return weight if compensation is None else weight.double() + compensation.double()

    def age(self, updates: int) -> None:
        """Make the optimizer believe that it has made so many updates more, for corrections that fade out."""
        for counters in [*self.optimizer.state.values(), *self.optimizer.param_groups]:
            if isinstance(counters.get("step"), (int, float, torch.Tensor)):
                counters["step"] = counters["step"] + updates

    def state(self, index: int, key: str) -> torch.Tensor | None:
        """Return a tensor of one parameter's state, None where there is none of its shape."""
        value = self.optimizer.state.get(self.weights[index], {}).get(key)
        same = isinstance(value, torch.Tensor) and value.shape == self.weights[index].shape
        return value if same else None

    @property
    def is_quantised(self) -> bool:
        """Whether its state holds other tensors than torch's own."""
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return any(isinstance(value, torch.Tensor) and type(value) is not torch.Tensor for value in values)


def make_twin(
    optimizer: torch.optim.Optimizer, cuts: Sequence[Cut], dtype: torch.dtype, start: torch.dtype | None = None
) -> Twin:
    """Copy an optimizer over cut-outs of some of its parameters; groups that lose all of theirs stay, empty.

    Args:
        optimizer: Read only.
        cuts: Of parameters it has.
        dtype: The twin's format.
        start: A format the weights are rounded to first; None is `dtype`.
    """
    weights: list[torch.Tensor] = [
        torch.nn.Parameter(cut.of(cut.parameter).to(start or dtype).to(dtype)) for cut in cuts
    ]
    stand_ins = {id(cut.parameter): weight for cut, weight in zip(cuts, weights, strict=True)}
    state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
    for cut, weight in zip(cuts, weights, strict=True):
        if cut.parameter in optimizer.state:
            state[weight] = {k: _cut_state(cut, k, v, dtype) for k, v in optimizer.state[cut.parameter].items()}
            _start_at_master(weight, state[weight])
    memo: dict[int, Any] = {id(optimizer.state): state, **stand_ins}
    groups = [_copy_group(group, stand_ins, memo) for group in optimizer.param_groups]
    memo[id(optimizer.param_groups)] = groups
    return Twin(_copy_optimizer(optimizer, memo), weights)


@torch.no_grad()
def _start_at_master(weight: torch.Tensor, state: dict[str, Any]) -> None:
    """In another format than bf16 no master copy is stepped: the weight starts where the copy is."""
    if MASTER in state and not is_narrow(weight):
        weight.copy_(state.pop(MASTER))


def _cut_state(cut: Cut, key: str, value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    of_elements = value.shape == cut.parameter.shape and key != "step"
    taken = cut.of(value) if of_elements else value.detach().clone()
    follows = value.dtype == cut.parameter.dtype and key != "step"
    exact = dtype == torch.float64 and value.is_floating_point() and of_elements
    return taken.to(dtype) if follows or exact else taken


def _copy_group(group: dict[str, Any], stand_ins: dict[int, torch.Tensor], memo: dict[int, Any]) -> dict[str, Any]:
    settings = {k: copy.deepcopy(v, memo) for k, v in group.items() if k not in ("params", "param_names")}
    return {**settings, "params": [stand_ins[id(p)] for p in group["params"] if id(p) in stand_ins]}


def _copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Copy attribute by attribute: `copy.deepcopy` of an optimizer keeps groups and state only."""
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    for key, value in vars(optimizer).items():
        if key in _LEFT_BEHIND:
            continue
        if isinstance(value, torch.optim.Optimizer):  # a wrapper's inner optimizer shares groups and state
            twin.__dict__[key] = memo.get(id(value)) or _copy_optimizer(value, memo)
        elif "hook" in key and isinstance(value, OrderedDict):
            twin.__dict__[key] = OrderedDict()
        else:
            twin.__dict__[key] = copy.deepcopy(value, memo)
    return twin


def steps_elements_alone(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool:
    """Say whether the optimizer, with the settings it has for this parameter, treats elements one by one.

    A tensor of 3 in each dimension is stepped twice in fp64, whole and as a cut of a part of its elements.

    Raises:
        Exception: Whatever the optimizer raises.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn([3] * parameter.dim(), generator=generator, dtype=torch.float64).to(parameter.device)
    fresh = _without_state(optimizer, parameter, whole)
    index = torch.arange(whole.numel(), device=whole.device)[:: 2 if whole.numel() > 1 else 1]
    cuts = [Cut(name="", parameter=whole), Cut(name="", parameter=whole, index=index if whole.dim() else None)]
    twins = [make_twin(fresh, [cut], torch.float64) for cut in cuts]
    for _ in range(2):
        gradient = torch.randn(whole.shape, generator=generator, dtype=torch.float64).to(whole.device)
        for cut, twin in zip(cuts, twins, strict=True):
            twin.step([cut.of(gradient)])
    expected = cuts[1].of(twins[0].weights[0])
    return torch.allclose(twins[1].weights[0].detach(), expected, rtol=1e-9, atol=1e-12)


def _without_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, instead: torch.Tensor
) -> torch.optim.Optimizer:
    """Return a copy that has no state and steps `instead` with the settings of `parameter`."""
    fresh = make_twin(optimizer, [Cut(name="", parameter=parameter, index=_none(parameter))], torch.float64)
    fresh.optimizer.state.clear()
    for group in fresh.optimizer.param_groups:
        group["params"] = [instead] * len(group["params"])
    return fresh.optimizer


def _none(parameter: torch.Tensor) -> torch.Tensor | None:
    return torch.zeros(0, dtype=torch.long, device=parameter.device) if parameter.dim() else None

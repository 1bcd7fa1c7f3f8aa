"""Other libraries' Adam for bf16 weights, made to fit where torch's Adam was.

    torch-optimi    Adam and AdamW with Kahan summation; all arithmetic in the weights' format
    torchao         AdamW with stochastic rounding; arithmetic in fp32, moments in the weights' format

The libraries' own code makes the update. What is added here: groups and state are those of the optimizer that is
replaced, so that schedules go on working and undo is exact but for the moments' format; and state dicts have the form
of torch's Adam, with `kahan_comp` beside the moments, so that a run may go on with another of them.

Not covered: other optimizers, `amsgrad`, `maximize`. What torch-optimi's Triton kernels need on a GPU is planned as the
loop over parameters, which needs more.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.techniques.optim_steps.low_bit_adam import LowBitAdam, is_adamw
from floatline.techniques.optim_steps.low_bit_state import torchao_optim
from floatline.techniques.optim_steps.wide_step import COMPENSATION
from floatline.techniques.optim_steps.wrapped import load_in_place, share

_OWN = ("beta1", "beta2", "decouple_wd", "decouple_lr", "max_lr", "kahan_sum", "triton", "gradient_release", "setup",
        "step")  # fmt: skip
"""Settings of torch-optimi's groups that torch's have not."""
_HALVES = (torch.bfloat16, torch.float16)


def refuse_settings(optimizer: torch.optim.Optimizer, library: str, kinds: tuple[type, ...]) -> None:
    """Raise unless `optimizer` is one of torch's that the library has too, with settings that it has.

    Raises:
        ConfigError: It is not.
    """
    if type(optimizer) not in kinds:
        names = " and ".join(f"torch.optim.{kind.__name__}" for kind in kinds)
        raise ConfigError(
            f"library={library!r} stands in for {names}, not for {type(optimizer).__name__}",
            hint="write library='floatline', which takes any optimizer",
        )
    for group in optimizer.param_groups:
        for setting in ("amsgrad", "maximize", "differentiable", "capturable"):
            if group.get(setting):
                raise ConfigError(
                    f"library={library!r} cannot do {setting}=True", hint=f"leave {setting} out, or library='floatline'"
                )


class LibraryAdam(torch.optim.Optimizer):
    """Base: an optimizer of another library over groups and state of torch's."""

    def finish(self) -> None:
        """Leave groups and state as torch's Adam has them."""


class OptimiAdam(LibraryAdam):
    """What is added to torch-optimi's Adam: torch's form of state, in memory and in state dicts."""

    def take_over(self) -> None:
        """Make groups and state of torch's Adam those of torch-optimi's; its step counts groups, not parameters."""
        for group in self.param_groups:
            group["beta1"], group["beta2"] = group["betas"]
            known = [self.state[p] for p in group["params"] if p in self.state]
            steps = [int(state.pop("step")) for state in known if "step" in state]
            group["setup"] = True
            group["step"] = torch.tensor(max(steps, default=0), dtype=torch.int32)
            for parameter in group["params"]:
                if parameter in self.state:
                    self._fit(parameter, group)

    def _fit(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].to(parameter.dtype)
        if parameter.dtype in _HALVES:
            state.setdefault(COMPENSATION, torch.zeros_like(parameter))
            group["kahan_sum"] = True
        else:
            placeholder = torch.zeros(1, dtype=torch.uint8, device=parameter.device)
            state[COMPENSATION] = placeholder if group["triton"] else None

    def finish(self) -> None:
        for group in self.param_groups:
            step = float(group.get("step", 0))
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter].pop(COMPENSATION, None)
                    self.state[parameter]["step"] = torch.tensor(step)
            for key in _OWN:
                group.pop(key, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form of torch's Adam."""
        packed = super().state_dict()
        state = dict(packed["state"])
        for group in packed["param_groups"]:
            for key in group["params"]:
                if key in state:
                    kept = {k: v for k, v in state[key].items() if k != COMPENSATION or is_half(v)}
                    state[key] = {**kept, "step": torch.tensor(float(group["step"]))}
        groups = [{k: v for k, v in group.items() if k not in _OWN} for group in packed["param_groups"]]
        return {**packed, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this or of torch's Adam."""
        own = [{key: group[key] for key in _OWN if key in group} for group in self.param_groups]
        load_in_place(self, state_dict, super().load_state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update({**settings, **group})
        self.take_over()


def is_half(value: Any) -> bool:
    """Say whether a value is a tensor of a half format."""
    return isinstance(value, torch.Tensor) and value.dtype in _HALVES


@cache
def _optimi_class(base: type) -> Any:
    return type(base.__name__, (OptimiAdam, base), {"__doc__": base.__doc__})


def to_optimi(optimizer: torch.optim.Optimizer) -> OptimiAdam:
    """Return torch-optimi's counterpart of an Adam or AdamW, with the same groups and state objects.

    Raises:
        ConfigError: It is not installed, or has no such optimizer or setting.
    """
    try:
        import optimi
    except ImportError as error:
        raise ConfigError(f"library='optimi' needs torch-optimi: {error}", hint="pip install torch-optimi") from error
    refuse_settings(optimizer, "optimi", (torch.optim.AdamW, torch.optim.Adam))
    base = optimi.AdamW if is_adamw(optimizer) else optimi.Adam
    known = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    made: OptimiAdam = _optimi_class(base)(optimizer.param_groups, **known)
    share(made, optimizer)
    made.take_over()
    return made


class TorchaoAdam(LowBitAdam, LibraryAdam):
    """torchao's AdamW with moments in the weights' format; nothing of it is quantised."""


def to_torchao_rounding(
    optimizer: torch.optim.Optimizer, *, eager: bool, stands_for_kernel: bool = False
) -> LibraryAdam:
    """Return torchao's AdamW that rounds bf16 weights stochastically, with the same groups and state objects.

    Args:
        optimizer: An AdamW.
        eager: Do not compile the step.
        stands_for_kernel: The eager step stands for a compiled one, whose intermediates have no memory.

    Raises:
        ConfigError: It is not installed, or has no such optimizer or setting.
    """
    base = torchao_optim()._AdamW
    refuse_settings(optimizer, "torchao", (torch.optim.AdamW,))
    known = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    rates = [group["lr"] for group in optimizer.param_groups]
    made: Any = _torchao_class(base)(optimizer.param_groups, **known, bf16_stochastic_round=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    share(made, optimizer)
    made.prepare(eager=eager, stands_for_kernel=stands_for_kernel)
    for parameter, state in made.state.items():
        state.update({key: state[key].to(parameter.dtype) for key in ("exp_avg", "exp_avg_sq") if key in state})
    return made


@cache
def _torchao_class(base: type) -> Any:
    return type(base.__name__, (TorchaoAdam, base), {"__doc__": base.__doc__})

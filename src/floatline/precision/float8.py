"""Linear layers that multiply in fp8, through torchao.float8, without taking the modules out of the model.

Under an fp8 policy a converted layer computes, with x in bf16 and W in fp32:

    y  = q(x) q(W)^T      dx = q(dy) q(W)      dW = q(dy)^T q(x)

`q` scales a tensor (or each row of it) so that its largest value meets the largest of the format, and rounds: e4m3 for
values, e5m2 for gradients with one scale a tensor, e4m3 for both with a scale a row. Scales are found anew in each
step. Sums are fp32, results bf16. Everything else of the model runs as under `bf16-mixed`.

torchao's `convert_to_float8_training` puts new modules in the place of the old ones: hooks, patches and references to
the old ones are lost. Here it converts one template, whose class and settings are given to the model's own modules. So
parameters, names, hooks, tied weights and the optimizer's references stay, and undo is the class as it was.

What is done beside it: torchao asks for CUDA's autocast only, so inputs are cast here, on every device; without
autocast the result comes back in the input's format; tokens, which the weights' gradient sums over, are padded to a
multiple of 16; a layer that gets no tokens (an expert nobody chose) is left to nn.Linear.

Not covered: fp8 all-gather of sharded weights (they are gathered in bf16), tensor parallel layers, grouped products of
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from floatline.errors import PrecisionError
from floatline.patch import ForwardPatch


@dataclass
class Float8Layer:
    """One linear layer that was converted; `undo()` makes it the plain one that it was."""

    module: nn.Module
    attributes: dict[str, Any]
    previous: dict[str, Any] = field(default_factory=dict)
    patch: ForwardPatch | None = None

    def install(self, kind: type[nn.Module], device_type: str) -> Float8Layer:
        own = vars(self.module)
        self.previous = {key: own[key] for key in self.attributes if key in own}
        own.update(self.attributes)
        self.module.__class__ = kind
        self.patch = ForwardPatch(self.module).install(_cast_around(device_type))
        return self

    def undo(self) -> None:
        if self.patch is None:
            return
        self.patch.undo()
        self.patch = None
        self.module.__class__ = nn.Linear
        for key in self.attributes:
            del vars(self.module)[key]
        vars(self.module).update(self.previous)


def convert(linears: dict[str, nn.Linear], scaling: str, *, emulate: bool, device_type: str) -> dict[str, Float8Layer]:
    """Make plain linear layers multiply in fp8, in place.

    Args:
        linears: Layers of class nn.Linear by name, dims multiples of 16.
        scaling: torchao's recipe: "tensorwise", "rowwise" or "rowwise_with_gw_hp".
        emulate: Multiply the rounded values in fp32, where there are no fp8 units.
        device_type: "cpu" or "cuda", for autocast.

    Returns:
        What undoes it, by name.

    Raises:
        PrecisionError: torchao is missing.
    """
    kind, attributes = _template(scaling, emulate)
    return {name: Float8Layer(linear, attributes).install(kind, device_type) for name, linear in linears.items()}


def _template(scaling: str, emulate: bool) -> tuple[type[nn.Module], dict[str, Any]]:
    """Return the class of torchao's layers, and the settings that one of them carries."""
    float8 = _torchao()
    config = float8.Float8LinearConfig.from_recipe_name(scaling)
    config = replace(config, emulate=emulate, pad_inner_dim=True)
    plain = nn.Linear(16, 16, device="meta")
    made = float8.convert_to_float8_training(plain, config=config)
    return type(made), {key: value for key, value in vars(made).items() if key not in vars(plain)}


def _torchao() -> Any:
    from floatline.techniques.optim_steps.low_bit_state import quiet_torchao

    quiet_torchao()
    try:
        import torchao.float8
    except ImportError as error:
        raise PrecisionError(
            f"training in fp8 needs torchao: {error}", hint='pip install "floatline[techniques]"'
        ) from error
    return torchao.float8


def _cast_around(device_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def float8_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
            if not input.numel():
                return nn.Linear.forward(self, input)
            mixed = torch.is_autocast_enabled(device_type)
            rows = input.reshape(-1, input.shape[-1]).to(torch.bfloat16)
            with torch.autocast(device_type, enabled=False):
                output = forward(self, rows)
            output = output.reshape(*input.shape[:-1], output.shape[-1])
            return output if mixed else output.to(input.dtype)

        return float8_forward

    return wrap

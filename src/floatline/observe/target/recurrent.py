"""LSTM and GRU layers as cuDNN computes them, on fake CPU tensors: one call for the whole stack, and its reserve.

A CPU goes through the layers one by one with kernels of its own. CUDA hands all layers and time steps to cuDNN, which
returns the outputs and a *reserve*: one buffer with what its backward needs. Within `target_recurrent` a call saves
input, states, output, weights and a reserve of this size, in elements of the computing format:

    LSTM   time x batch x hidden x directions x (5 layers + (layers - 1))    four gates and the cell; outputs between
    layers GRU    time x batch x hidden x directions x (6 layers + (layers - 1))

cuDNN does not publish the size, it has to be asked on a GPU. The formula is derived: the reserves that pytorch#2895
reports for an LSTM and a GRU of 4 layers with 320 hidden units in fp32 (736,000,000 and 864,000,000 bytes) are met
exactly by it at 25,000 rows (time x batch). It has not been held against a newer cuDNN, nor against half precision.

Under autocast, inputs and weights are cast at each call and the cast weights are kept, as CUDA does it (they are not
cached). The gradients of all weights lie in one buffer. In evaluation mode there is no reserve, and backward raises.

cuDNN takes fp32, fp16 and fp64 (and what autocast makes of them). Left to torch's own code, which on CUDA uses a
fused kernel a time step: bf16 layers without autocast, `proj_size`, plain RNNs, and everything where
torch.backends.cudnn is off. Not covered: cuDNN's workspace and the 2 MiB of state of a dropout between layers.

Source: ATen/native/cudnn/RNN.cpp; github.com/pytorch/pytorch/issues/2895.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.observe.target.kernels import Kernel, is_fake_cpu, kernels_on, own_body

_KEPT_A_LAYER = {"lstm": 5, "gru": 6}
_FORMATS = (torch.float32, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """The shape of one call: rows are time x batch, or the sum over a packed sequence."""

    kind: str
    rows: int
    hidden: int
    layers: int
    directions: int
    train: bool

    @property
    def reserve(self) -> int:
        """Elements of cuDNN's reserve."""
        kept = _KEPT_A_LAYER[self.kind] * self.layers + self.layers - 1
        return self.rows * self.hidden * self.directions * kept if self.train else 0


@contextmanager
def target_recurrent() -> Iterator[None]:
    """Compute LSTM and GRU layers on fake CPU tensors as by cuDNN while the context is open."""
    table: dict[str, Kernel] = {}
    for kind in _KEPT_A_LAYER:
        table[f"{kind}.input"] = partial(_padded, kind, own_body(f"{kind}.input"))
        table[f"{kind}.data"] = partial(_packed, kind, own_body(f"{kind}.data"))
    with kernels_on("CompositeImplicitAutograd", table):
        yield


def _padded(
    kind: str,
    own: Kernel,
    x: torch.Tensor,
    hx: Any,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    if not _for_cudnn(x, hx, params):
        return own(x, hx, params, has_biases, layers, dropout, train, bidirectional, batch_first)
    return _run(kind, x, hx, params, layers, train, bidirectional)


def _packed(
    kind: str,
    own: Kernel,
    x: torch.Tensor,
    batch_sizes: torch.Tensor,
    hx: Any,
    params: Sequence[torch.Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> Any:
    if not _for_cudnn(x, hx, params):
        return own(x, batch_sizes, hx, params, has_biases, layers, dropout, train, bidirectional)
    return _run(kind, x, hx, params, layers, train, bidirectional)


def _for_cudnn(x: torch.Tensor, hx: Any, params: Sequence[torch.Tensor]) -> bool:
    states = _states(hx)
    projected = len({state.shape[-1] for state in states}) > 1
    fits = is_fake_cpu(x, *states, *params) and x.dtype in _FORMATS and not projected
    return fits and torch.backends.cudnn.enabled


def _states(hx: Any) -> list[torch.Tensor]:
    return [hx] if isinstance(hx, torch.Tensor) else list(hx)


def _run(
    kind: str, x: torch.Tensor, hx: Any, params: Sequence[torch.Tensor], layers: int, train: bool, bidirectional: bool
) -> Any:
    states = _states(hx)
    inputs = [x, *states, *params]
    if torch.is_autocast_enabled("cpu"):
        inputs = [t.to(torch.get_autocast_dtype("cpu")) if t.dtype != torch.float64 else t for t in inputs]
    stack = _Stack(
        kind=kind,
        rows=x.shape[:-1].numel(),
        hidden=states[0].shape[-1],
        layers=layers,
        directions=2 if bidirectional else 1,
        train=train,
    )
    return _CudnnStack.apply(stack, len(states), *inputs)


class _CudnnStack(torch.autograd.Function):
    """What cuDNN allocates and saves; fake tensors have no values to compute."""

    @staticmethod
    def forward(ctx: Any, stack: _Stack, states: int, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        output = x.new_empty((*x.shape[:-1], stack.hidden * stack.directions))
        reserve = x.new_empty(stack.reserve * x.element_size(), dtype=torch.uint8)
        ctx.stack, ctx.states = stack, states
        ctx.save_for_backward(*inputs, output, reserve)
        return output, *(state.new_empty(state.shape) for state in inputs[1 : 1 + states])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if not ctx.stack.train:
            raise ConfigError(
                f"cuDNN has no backward for {ctx.stack.kind.upper()} layers in evaluation mode",
                hint="call model.train(), or set torch.backends.cudnn.enabled = False",
            )
        *inputs, _, _ = ctx.saved_tensors
        first_weight = 1 + ctx.states
        found = [t.new_empty(t.shape) for t in inputs[:first_weight]]  # cuDNN computes these whether wanted or not
        weights = inputs[first_weight:]
        if any(ctx.needs_input_grad[2 + first_weight :]):
            buffer = weights[0].new_zeros(sum(w.numel() for w in weights))
            found += [part.view(w.shape) for part, w in zip(buffer.split([w.numel() for w in weights]), weights)]
        else:
            found += [None] * len(weights)
        return None, None, *found

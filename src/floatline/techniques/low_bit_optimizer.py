"""Low-bit optimizer state: Adam's two moments in 8 or 4 bits, or in fp8.

Blocks of `block_size` values share an fp32 scale; a value is a code of a table that is finer near zero (8 and 4 bits)
or an fp8-e4m3 number. The update itself is computed in fp32. Bytes a parameter for both moments: 8 in fp32, 2.03 in 8
bits and fp8 (blocks of 256), 1.06 in 4 bits (blocks of 128). Tensors of fewer than 4096 elements, or whose size is no
multiple of the block, stay in the weights' format: they are few and small, and their moments matter.

torchao does the work; it compiles its step on CUDA, one kernel a parameter shape (slow the first time). On a CPU,
without Triton or before Volta the same step runs eagerly, which needs a few fp32 copies of the largest parameter.
bitsandbytes (8 bits, CUDA) has its own kernels and needs no compiler.

It changes the maths: moments are rounded to 8 bits after each update. Published training curves match fp32's; 4 bits
and fp8 are coarser. What an optimizer knows already is quantised when the technique is applied, dequantised on undo.

State dicts: low-bit state is saved as plain tensors and resumes bit for bit (low_bit_state.py); that of a plain Adam
is quantised when it is loaded, and `TrainStep` gives a plain Adam dequantised state. bitsandbytes reads only its own.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; Li et al., Memory Efficient
Optimizers with 4-bit States, arXiv 2309.01507.
Not covered: other optimizers than Adam and AdamW; `maximize`; several devices in one optimizer with bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict, format_verdict
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.low_bit_state import INSTALL, decode, encode, is_quantised, torchao_optim
from floatline.techniques.partial_step import state_bytes
from floatline.techniques.wrapped_optimizer import load_in_place, saved_state_of, share

SMALLEST = 4096
"""Elements below which both libraries leave state in full precision."""

BLOCKS = {8: 256, 4: 128, "fp8": 256}
"""Default block size by format, the libraries' own."""

MOMENTS = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}
"""Adam's state tensors, and whether each has signs."""


@dataclass(frozen=True, kw_only=True)
class LowBitOptimizer(Technique):
    """Keep Adam's moments in few bits.

    Args:
        bits: 8, 4 or "fp8".
        block_size: Values that share a scale; None is 256, for 4 bits 128.
        stochastic_rounding: Round bf16 weights stochastically after the update, so that small updates are not lost.
        library: "torchao", "bitsandbytes" (8 bits on CUDA), or "auto": torchao where it is installed.

    Raises:
        ConfigError: A block size that is odd or below 2, or settings that bitsandbytes has not.
    """

    name = "low_bit_optimizer"
    stage = Stage.OPTIMIZER

    bits: Literal[8, 4, "fp8"] = 8
    block_size: int | None = None
    stochastic_rounding: bool = False
    library: Literal["auto", "torchao", "bitsandbytes"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("block_size", 2)
        if self.block_size is not None and self.block_size % 2:
            raise self.bad("block_size", "give an even number, e.g. 256")
        if self.library == "bitsandbytes":
            self._refuse_what_bitsandbytes_has_not()

    def _refuse_what_bitsandbytes_has_not(self) -> None:
        if self.bits != 8:
            raise self.bad("bits", "bitsandbytes has 8 bits; write library='torchao' for 4 bits and fp8")
        if self.stochastic_rounding:
            raise self.bad("stochastic_rounding", "bitsandbytes rounds to nearest; write library='torchao'")
        if self.block_size not in (None, BLOCKS[8]):
            raise self.bad("block_size", "bitsandbytes has blocks of 256")

    @property
    def block(self) -> int:
        """The block size in use."""
        return self.block_size or BLOCKS[self.bits]

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        if self._chosen_library(hardware)[0] == "bitsandbytes":
            if hardware.kind != "cuda":
                return Verdict(False, "bitsandbytes' 8-bit optimizers need CUDA; write library='torchao'")
            return Verdict(True, "bitsandbytes has kernels for every CUDA GPU")
        if self.bits == "fp8" and hardware.kind == "cuda":
            return format_verdict(hardware, "fp8")
        return Verdict(True, f"torchao's low-bit Adam runs on {hardware.name}")

    def _chosen_library(self, hardware: Hardware) -> tuple[str, str]:
        """Return the library and the reason for it."""
        installed = {name: find_spec(name) is not None for name in ("torchao", "bitsandbytes")}
        if self.library != "auto":
            if not installed[self.library]:
                pip = INSTALL if self.library == "torchao" else "pip install bitsandbytes"
                raise ConfigError(f"{self} needs {self.library}, which is not installed", hint=pip)
            return self.library, "as asked for"
        if installed["torchao"]:
            return "torchao", "it is installed and has every format"
        if installed["bitsandbytes"] and hardware.kind == "cuda" and self._fits_bitsandbytes:
            return "bitsandbytes", "torchao is not installed"
        raise ConfigError(f"{self} needs torchao, which is not installed", hint=INSTALL)

    @property
    def _fits_bitsandbytes(self) -> bool:
        return self.bits == 8 and not self.stochastic_rounding and self.block == BLOCKS[8]

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        library, reason = self._chosen_library(hardware)
        how = f"uses {library}: {reason}"
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        quantised = tuple(name for name, p in trainable.items() if self.quantises(p))
        kept = sum(p.numel() for name, p in trainable.items() if name not in set(quantised))
        share_kept = kept / max(1, sum(p.numel() for p in trainable.values()))
        notes = [how, _how_many(len(quantised), len(trainable), share_kept, self.block)]
        if library == "torchao" and not compiles(hardware):
            notes.append(f"torchao's step runs eagerly on {hardware.name}: compiling it needs Triton, Volta and newer")
        made: list[torch.optim.Optimizer] = []

        def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            refuse_optimizer(optimizer)
            if library == "torchao":
                made.append(to_torchao(optimizer, self, eager=not compiles(hardware)))
            else:
                made.append(to_bitsandbytes(optimizer))
            return made[-1]

        def undo() -> None:
            for optimizer in made:
                dequantise(optimizer)
            made.clear()

        def facts() -> dict[str, float]:
            return {"state_bytes": float(sum(map(state_bytes, made)))}

        touched = quantised or tuple(trainable)
        return Applied(
            technique=self, touched=touched, undo=undo, notes=tuple(notes), optimizer=convert, facts=facts
        )

    def quantises(self, parameter: torch.Tensor) -> bool:
        """Say whether a parameter's moments are kept in few bits."""
        return parameter.numel() >= SMALLEST and parameter.numel() % self.block == 0


def _how_many(quantised: int, trainable: int, share_kept: float, block: int) -> str:
    why = f"(fewer than {SMALLEST} elements, or no multiple of {block})"
    if not quantised:
        return f"saves nothing: every parameter keeps full-precision state {why}"
    return f"{quantised} of {trainable} parameters; {100 * share_kept:.1f} % of elements keep full precision {why}"


def compiles(hardware: Hardware) -> bool:
    """Say whether torchao's step is compiled there."""
    return hardware.kind == "cuda" and (hardware.capability or (0, 0)) >= (7, 0) and find_spec("triton") is not None


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise unless `optimizer` is torch's Adam or AdamW with settings that the low-bit ones have.

    Raises:
        ConfigError: It is not.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise ConfigError(
            f"low_bit_optimizer converts torch.optim.Adam and AdamW, not {type(optimizer).__name__}",
            hint="give optimizer=torch.optim.AdamW, or use optimizer_offload, which takes any optimizer",
        )
    for group in optimizer.param_groups:
        for setting in ("maximize", "differentiable"):
            if group.get(setting):
                raise ConfigError(f"low_bit_optimizer cannot do {setting}=True", hint=f"leave {setting} out")


def _is_adamw(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) or bool(optimizer.defaults.get("decoupled_weight_decay"))


class LowBitAdam(torch.optim.Optimizer):
    """What is added to torchao's Adam: a plain learning rate, eager steps, one table for all, state dicts."""

    eager: bool
    block_size: int

    def prepare(self, *, eager: bool) -> None:
        self.eager = eager
        self._tables: dict[tuple[Any, ...], torch.Tensor] = {}

    def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """Return zero state; all tensors of one kind share the table, which is 1 KiB each otherwise."""
        made: torch.Tensor = super()._new_buffer(p, signed)  # type: ignore[misc]
        return self._with_shared_table(made)

    def _with_shared_table(self, value: Any) -> Any:
        if hasattr(value, "qmap") and is_quantised(value):
            key = (type(value), value.signed, value.qmap.device, type(value.qmap))
            value.qmap = self._tables.setdefault(key, value.qmap)
        return value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """torchao wants the learning rate as a tensor; schedules and logs keep the number they know."""
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate if isinstance(rate, torch.Tensor) else torch.tensor(rate, dtype=torch.float32)
            with self._stance():
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _stance(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager") if self.eager else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Return the state with quantised tensors as plain ones."""
        packed = super().state_dict()
        state = {key: {name: encode(v) for name, v in values.items()} for key, values in packed["state"].items()}
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a low-bit state dict bit for bit; full-precision moments, or those of other bits, are quantised."""
        load_in_place(self, {**state_dict, "state": {}}, super().load_state_dict)
        for _, parameter, saved in saved_state_of(self, state_dict):
            self.state[parameter] = {key: self._loaded(parameter, key, value) for key, value in saved.items()}

    def _loaded(self, parameter: torch.Tensor, key: str, value: Any) -> Any:
        if key not in MOMENTS:
            return value.clone() if isinstance(value, torch.Tensor) else value
        return self.quantised(parameter, key, decode(value))

    def quantised(self, parameter: torch.Tensor, key: str, value: Any) -> torch.Tensor:
        """Return a moment in the format that this optimizer has for `parameter`."""
        fresh: Any = self._new_buffer(parameter, MOMENTS[key])
        if type(value) is type(fresh) and is_quantised(value) and value.block_size == fresh.block_size:
            return self._with_shared_table(value.to(parameter.device))
        full = value.dequantize() if is_quantised(value) else value
        fresh.copy_(full.to(parameter.device, torch.float32))
        return fresh


@cache
def _low_bit_class(base: type) -> Any:
    return type(base.__name__, (LowBitAdam, base), {"__doc__": base.__doc__})


def to_torchao(optimizer: torch.optim.Optimizer, technique: LowBitOptimizer, *, eager: bool) -> torch.optim.Optimizer:
    """Return torchao's low-bit counterpart of an Adam or AdamW, with the same groups and state objects."""
    suffix = "Fp8" if technique.bits == "fp8" else f"{technique.bits}bit"
    base = getattr(torchao_optim(), f"Adam{'W' if _is_adamw(optimizer) else ''}{suffix}")
    known = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    rates = [group["lr"] for group in optimizer.param_groups]
    made = _low_bit_class(base)(
        optimizer.param_groups,
        **known,
        block_size=technique.block,
        bf16_stochastic_round=technique.stochastic_rounding,
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    share(made, optimizer)
    made.prepare(eager=eager)
    for parameter, state in made.state.items():
        state.update({key: made.quantised(parameter, key, state[key]) for key in MOMENTS if key in state})
    return made


def to_bitsandbytes(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return bitsandbytes' 8-bit counterpart of an Adam or AdamW, with the same groups.

    Raises:
        ConfigError: The optimizer has taken steps already, or uses amsgrad; bitsandbytes can continue neither.
    """
    if optimizer.state:
        raise ConfigError(
            "bitsandbytes cannot take over the state of an optimizer that has stepped already",
            hint="write low_bit_optimizer(library='torchao')",
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ConfigError("bitsandbytes has no amsgrad", hint="write low_bit_optimizer(library='torchao')")
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if _is_adamw(optimizer) else bitsandbytes.optim.Adam8bit
    known = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    made: torch.optim.Optimizer = kind(optimizer.param_groups, **known)
    share(made, optimizer)
    return made


@torch.no_grad()
def dequantise(optimizer: torch.optim.Optimizer) -> None:
    """Turn torchao's low-bit state into tensors of the weights' format, in place; bitsandbytes' is dropped."""
    if not isinstance(optimizer, LowBitAdam):
        optimizer.state.clear()
        return
    for parameter, state in optimizer.state.items():
        for key in MOMENTS:
            if is_quantised(state.get(key)):
                state[key] = state[key].dequantize().to(parameter.dtype)

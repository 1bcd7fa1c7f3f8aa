"""Low-bit optimizer state: Adam's two moments in 8 or 4 bits, or in fp8.

Blocks of `block_size` values share an fp32 scale; a value is a code of a table that is finer near zero (8 and 4 bits)
or an fp8-e4m3 number. The update itself is computed in fp32. Bytes a parameter for both moments: 8 in fp32, 2.03 in 8
bits and fp8 (blocks of 256), 1.06 in 4 bits (blocks of 128). Tensors of fewer than 4096 elements, or whose size is no
multiple of the block, stay in the weights' format: they are few and small, and their moments matter.

torchao does the work; it compiles its step on CUDA, one kernel a parameter shape (slow the first time). On a CPU,
without Triton or before Volta the same step runs eagerly, which needs a few fp32 copies of the largest parameter.
A plan for a GPU that compiles it computes it eagerly too, and takes each parameter's step for one kernel.
bitsandbytes (8 bits, CUDA) has its own kernels and needs no compiler.

It changes the maths: moments are rounded to 8 bits after each update. Published training curves match fp32's; 4 bits
and fp8 are coarser. What an optimizer knows already is quantised when the technique is applied, dequantised on undo.

State dicts: low-bit state is saved as plain tensors and resumes bit for bit (low_bit_state.py); that of a plain Adam
is quantised when it is loaded, and `TrainStep` gives a plain Adam dequantised state. bitsandbytes reads only its own.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861; Li et al., Memory Efficient
Optimizers with 4-bit States, arXiv 2309.01507.
Not covered: other optimizers than Adam and AdamW; `amsgrad` and `maximize`; state of sharded parameters is saved as
torchao makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict, format_verdict
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.optim_steps.low_bit_adam import LowBitAdam, dequantise, is_adamw, to_torchao
from floatline.techniques.optim_steps.low_bit_state import INSTALL
from floatline.techniques.optim_steps.partial_step import state_bytes
from floatline.techniques.optim_steps.wrapped import share
from floatline.techniques.placement import stands_in

SMALLEST = 4096
"""Elements below which both libraries leave state in full precision."""

BLOCKS = {8: 256, 4: 128, "fp8": 256}
"""Default block size by format, the libraries' own."""


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
        planned = stands_in(model, hardware)
        compiled = compiles(hardware, triton=planned or find_spec("triton") is not None)
        if library == "torchao" and not compiled:
            notes.append(f"torchao's step runs eagerly on {hardware.name}: compiling it needs Triton, Volta and newer")
        made: list[torch.optim.Optimizer] = []

        def convert(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
            refuse_optimizer(optimizer)
            if library == "torchao":
                made.append(self._to_torchao(optimizer, compiled=compiled, planned=planned))
            else:
                made.append(to_bitsandbytes(optimizer))
            return made[-1]

        def undo() -> None:
            for optimizer in made:
                if isinstance(optimizer, LowBitAdam):
                    dequantise(optimizer)
                else:
                    optimizer.state.clear()  # only bitsandbytes can read it
            made.clear()

        def facts() -> dict[str, float]:
            return {"state_bytes": float(sum(map(state_bytes, made)))}

        touched = quantised or tuple(trainable)
        return Applied(technique=self, touched=touched, undo=undo, notes=tuple(notes), optimizer=convert, facts=facts)

    def _to_torchao(self, optimizer: torch.optim.Optimizer, *, compiled: bool, planned: bool) -> LowBitAdam:
        return to_torchao(
            optimizer,
            self.bits,
            block_size=self.block,
            stochastic_rounding=self.stochastic_rounding,
            eager=planned or not compiled,
            stands_for_kernel=planned and compiled,
        )

    def quantises(self, parameter: torch.Tensor) -> bool:
        """Say whether a parameter's moments are kept in few bits."""
        return parameter.numel() >= SMALLEST and parameter.numel() % self.block == 0


def _how_many(quantised: int, trainable: int, share_kept: float, block: int) -> str:
    why = f"(fewer than {SMALLEST} elements, or no multiple of {block})"
    if not quantised:
        return f"saves nothing: every parameter keeps full-precision state {why}"
    return f"{quantised} of {trainable} parameters; {100 * share_kept:.1f} % of elements keep full precision {why}"


def compiles(hardware: Hardware, *, triton: bool) -> bool:
    """Say whether torchao's step is compiled there, with or without Triton."""
    return hardware.kind == "cuda" and (hardware.capability or (0, 0)) >= (7, 0) and triton


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
        for setting in ("amsgrad", "maximize", "differentiable"):  # torchao's amsgrad fails on quantised state
            if group.get(setting):
                raise ConfigError(f"low_bit_optimizer cannot do {setting}=True", hint=f"leave {setting} out")


def to_bitsandbytes(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return bitsandbytes' 8-bit counterpart of an Adam or AdamW, with the same groups.

    Raises:
        ConfigError: The optimizer has taken steps already, which bitsandbytes cannot continue.
    """
    if optimizer.state:
        raise ConfigError(
            "bitsandbytes cannot take over the state of an optimizer that has stepped already",
            hint="write low_bit_optimizer(library='torchao')",
        )
    import bitsandbytes

    kind = bitsandbytes.optim.AdamW8bit if is_adamw(optimizer) else bitsandbytes.optim.Adam8bit
    known = {key: optimizer.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")}
    made: torch.optim.Optimizer = kind(optimizer.param_groups, **known)
    share(made, optimizer)
    return made

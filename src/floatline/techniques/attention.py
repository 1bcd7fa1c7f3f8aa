"""Attention by the best kernel that the GPU can run: without it the matrix of all pairs of tokens is kept for backward.

The kernels of `torch.nn.functional.scaled_dot_product_attention` (SDPA):

    flash       never stores the matrix; fp16 and bf16; no mask besides causal on CUDA; from Ampere [8.0], and on CPU
    efficient   never stores the matrix; also fp32, also masks; from Maxwell [5.0], so on a T4 [7.5] too
    cudnn       as flash, tuned by cuDNN, with masks; from Ampere
    math        plain matmuls: the matrix of length x length is stored for each head; runs everywhere

and those outside of it, for Hugging Face models: `flash-attn-2` (Ampere) and `flash-attn-3` (Hopper) from their
packages, and `flex` (torch's FlexAttention, compiled for the mask at hand).

SDPA itself looks at each call's shapes, dtype and mask and takes the first kernel of an order that can do it. The
technique sets that order, around forward and backward (activation checkpointing computes the forward again there, and
must meet the same kernel), and it always ends in math. So in fp32, or with a padding mask, flash gives way to efficient
by itself. What the hardware, the model or a missing package rules out falls back, and a note tells the reason.

Models that multiply out their attention themselves ("eager" in Hugging Face) are switched to SDPA where they have it.

Not covered: attention written out in a module of one's own (matmul, softmax, matmul; there is no call to steer),
`nn.MultiheadAttention` that is asked for its weights, and forwards outside of the step, where torch's order holds.
The order is a setting of the process: two models stepped in two threads at once would share it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from floatline.hardware import Hardware, attention_verdict, detect
from floatline.precision import Policy
from floatline.techniques import attention_hf
from floatline.techniques.base import Applied, Stage, Technique

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_PACKAGES = {
    "flash-attn-2": (("flash_attn", "kernels"), "pip install flash-attn --no-build-isolation"),
    "flash-attn-3": (("flash_attn_3", "flash_attn_interface", "kernels"), "pip install kernels"),
}
_NEXT = {"flash-attn-3": "flash-attn-2"}
"""What is tried before SDPA where a kernel cannot be had."""


@dataclass(frozen=True, kw_only=True)
class Attention(Technique):
    """Compute attention by a given kernel.

    Args:
        kernel: The kernel wanted; "auto" is the best of SDPA's that the hardware can run.

    Raises:
        ConfigError: No kernel has that name.

    Source: Dao, FlashAttention-2 (arXiv 2307.08691); Rabe and Staats (arXiv 2112.05682) for the memory-efficient one.

    >>> str(Attention(kernel="efficient"))
    "attention(kernel='efficient')"
    """

    name = "attention"
    stage = Stage.ATTENTION

    kernel: Literal["auto", "flash", "efficient", "cudnn", "math", "flash-attn-2", "flash-attn-3", "flex"] = "auto"

    def refuses(self, policy: Policy, max_grad_norm: float | None) -> str | None:
        if self.kernel not in _PACKAGES or policy.base.compute != "fp32" or _missing(self.kernel):
            return None
        if not attention_verdict(detect(), self.kernel):
            return None  # it falls back to a kernel that multiplies fp32
        return f"it multiplies fp16 and bf16, not {policy}'s fp32; use bf16-mixed, or kernel=efficient"

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        taken = attention_hf.snapshot(model)
        kernel, notes = self._choose(model, hardware)
        if kernel not in attention_hf.NAMES:
            notes += _use_sdpa(model, hardware, keep_others=self.kernel == "auto")
        sdpa = kernel if kernel in _BACKENDS else sdpa_choice("auto", hardware)[0]
        touched = attention_modules(model)
        return Applied(
            technique=self,
            touched=touched,
            undo=lambda: attention_hf.restore(taken),
            notes=tuple(notes if touched else [f"{type(model).__name__} seems to have no attention"]),
            during=kernel_order(sdpa, hardware),
        )

    def _choose(self, model: nn.Module, hardware: Hardware) -> tuple[str, list[str]]:
        """Return the kernel to use, set where it is Hugging Face's, and the notes of how it was chosen."""
        reasons: list[str] = []
        wanted: str | None = self.kernel
        while wanted in attention_hf.NAMES:
            reason = _unavailable(wanted, model, hardware)
            if reason is None:
                changed, kept = _switch_all(model, attention_hf.NAMES[wanted])
                if changed:
                    return wanted, [*_fallback_note(self.kernel, wanted, reasons), *kept]
                reason = kept[0]  # the whole model's; those of its parts say the same
            reasons.append(reason)
            wanted = _NEXT.get(wanted)
        kernel, why_not = sdpa_choice(wanted or "auto", hardware)
        reasons = reasons or why_not[:1] or [attention_verdict(hardware, kernel).reason]
        return kernel, [*_fallback_note(self.kernel, kernel, reasons), *_format_note(kernel, hardware)]


def sdpa_choice(kernel: str, hardware: Hardware) -> tuple[str, list[str]]:
    """Return the SDPA kernel to put first, and why those that come before it cannot run.

    >>> from floatline.hardware import resolve
    >>> sdpa_choice("auto", resolve("t4"))
    ('efficient', ['t4 is Turing, capability 7.5; flash attention kernels start at 8.0'])
    """
    reasons: list[str] = []
    asked = [] if kernel == "auto" else [kernel]
    for candidate in dict.fromkeys([*asked, "flash", "efficient"]):
        verdict = attention_verdict(hardware, candidate)
        if verdict:
            return candidate, reasons
        reasons.append(verdict.reason)
    return "math", reasons


def kernel_order(kernel: str, hardware: Hardware) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of the context in which SDPA tries `kernel` first, then the other fused ones, then math."""
    others = [] if kernel == "math" else [k for k in ("flash", "efficient") if attention_verdict(hardware, k)]
    order = list(dict.fromkeys([kernel, *others, "math"]))
    return partial(sdpa_kernel, [_BACKENDS[name] for name in order], set_priority=True)


def attention_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the attention modules.

    Those are `nn.MultiheadAttention`, Hugging Face's (named ...Attention, with a config), and every module whose
    forward names `scaled_dot_product_attention`. A model with something else called attention counts as a whole: its
    calls may lie in a function. Without any the result is empty.
    """
    found = tuple(name for name, module in model.named_modules() if _is_attention(module))
    if found:
        return found
    called = any("attention" in type(m).__name__.lower() or "attn" in name.lower() for name, m in model.named_modules())
    return ("",) if called else ()


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    if attention_hf.has_config(module):
        return type(module).__name__.endswith("Attention")
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


def _switch_all(model: nn.Module, implementation: str) -> tuple[bool, list[str]]:
    """Give every Hugging Face part an implementation; returns whether one took it, and what kept its own and why."""
    results = [attention_hf.switch(part, implementation) for part in attention_hf.hugging_face_parts(model).values()]
    return any(changed for changed, _ in results), [reason for _, kept in results for reason in kept]


def _use_sdpa(model: nn.Module, hardware: Hardware, *, keep_others: bool) -> list[str]:
    """Switch Hugging Face models to SDPA; under "auto" those that were loaded with a kernel that runs keep it."""
    notes: list[str] = []
    for part in attention_hf.hugging_face_parts(model).values():
        now = attention_hf.implementations(part)
        spelled = ", ".join(sorted(now - {"sdpa"}))
        others = [attention_hf.kernel_of(name) for name in now - {"sdpa", "eager"}]
        if not spelled:
            continue
        if keep_others and others and all(kernel and attention_verdict(hardware, kernel) for kernel in others):
            notes.append(f"{type(part).__name__} was loaded with {spelled}, which is kept")
        elif any(getattr(config, "output_attentions", False) for config in attention_hf.configs_of(part)):
            notes.append(f"{type(part).__name__} keeps {spelled}: it is to return its attention weights")
        else:
            changed, kept = attention_hf.switch(part, "sdpa")
            notes += [*([f"{type(part).__name__}: {spelled} -> sdpa"] if changed else []), *kept]
    return notes


def _unavailable(kernel: str, model: nn.Module, hardware: Hardware) -> str | None:
    """Return why a kernel outside of SDPA cannot be had, None where it can."""
    verdict = attention_verdict(hardware, kernel)
    if not verdict:
        return verdict.reason
    if not attention_hf.hugging_face_parts(model):
        return f"{kernel} is set through Hugging Face models, {type(model).__name__} holds none"
    if kernel != "flex":
        return _missing(kernel)
    if hardware.kind == "cpu":
        return "FlexAttention has no backward on CPU"
    dropout = attention_hf.attention_dropout(model)
    return f"FlexAttention has no dropout, the config asks for {dropout}" if dropout else None


def _missing(kernel: str) -> str | None:
    packages, install = _PACKAGES[kernel]
    if any(find_spec(package) for package in packages):
        return None
    return f"{packages[0]} is not installed ({install})"


def _fallback_note(asked: str, got: str, reasons: list[str]) -> list[str]:
    return [f"{asked} -> {got}: {'; '.join(reasons)}"] if got != asked else []


def _format_note(kernel: str, hardware: Hardware) -> list[str]:
    if hardware.kind == "cpu" or kernel not in ("flash", "cudnn"):
        return []
    return [f"{kernel} attention multiplies fp16 and bf16; calls in fp32 (32-true, islands) take the efficient kernel"]

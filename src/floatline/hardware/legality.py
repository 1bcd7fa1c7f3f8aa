"""Which number format and which attention kernel a device can run, each answer with its reason.

The rules (compute capability in brackets): fp16 arithmetic at twice fp32's rate on P100 [6.0], not on the other Pascal
cards [6.1, 6.2], with tensor cores from Volta [7.0]; bf16 from Ampere [8.0]; fp8 from Ada [8.9].
`torch.cuda.is_bf16_supported()` answers True on a T4 because it counts emulation (pytorch#148322), so the capability
is asked instead. FlashAttention-2 and FlexAttention need Ampere; Turing has the memory-efficient kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from floatline.errors import ConfigError, did_you_mean
from floatline.hardware.catalog import Hardware

_FORMAT_NEEDS = {"fp16": (6, 0), "tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}
_SLOW_FP16 = {(6, 1), (6, 2)}
_KERNEL_NEEDS = {
    "math": (0, 0),
    "efficient": (5, 0),
    "flash": (8, 0),
    "flex": (8, 0),
    "cudnn": (8, 0),
    "flash-attn-2": (8, 0),
    "flash-attn-3": (9, 0),
}


@dataclass(frozen=True)
class Verdict:
    """Yes or no with the reason as a sentence."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


def format_verdict(hardware: Hardware, number_format: str) -> Verdict:
    """Say whether `hardware` multiplies matrices of `number_format` (fp32, tf32, fp16, bf16, fp8) in hardware.

    Raises:
        ConfigError: The format is not one of those.
    """
    if number_format == "fp32":
        return Verdict(True, "fp32 runs everywhere")
    if number_format not in _FORMAT_NEEDS:
        raise ConfigError(f"no rule for format {number_format!r}", hint=did_you_mean(number_format, _FORMAT_NEEDS))
    if hardware.kind == "cpu":
        return _cpu_verdict(hardware, number_format)
    if number_format == "fp16" and hardware.capability in _SLOW_FP16:
        return Verdict(False, f"{hardware.name} is {hardware.generation} with fp16 at 1/64 of fp32's rate")
    return _capability_verdict(hardware, number_format, _FORMAT_NEEDS[number_format], "units")


def fp8_emulated(hardware: Hardware) -> str:
    """Return why fp8 matrix products are emulated on `hardware`; "" where it has units for them.

    torch has a scaled fp8 product (`torch._scaled_mm`) for those units only. Casts to fp8 run everywhere.
    """
    if hardware.kind == "cpu":
        return f"torchao has no fp8 products for CPUs ({hardware.name})"
    verdict = format_verdict(hardware, "fp8")
    return "" if verdict else verdict.reason


def attention_verdict(hardware: Hardware, kernel: str) -> Verdict:
    """Say whether `hardware` runs an attention kernel: math, efficient, flash, cudnn, flex, flash-attn-2, flash-attn-3.

    Raises:
        ConfigError: The kernel is not one of those.
    """
    if kernel not in _KERNEL_NEEDS:
        raise ConfigError(f"unknown attention kernel {kernel!r}", hint=did_you_mean(kernel, _KERNEL_NEEDS))
    if hardware.kind == "cpu":
        ok = kernel in {"math", "flash", "flex"}
        return Verdict(ok, f"{kernel} attention {'has a' if ok else 'has no'} CPU kernel in torch")
    if kernel == "flash-attn-3" and (hardware.capability or (0, 0)) >= (10, 0):
        return Verdict(False, f"{hardware.name} is {hardware.generation}; flash-attn-3 is built for Hopper only")
    return _capability_verdict(hardware, f"{kernel} attention", _KERNEL_NEEDS[kernel], "kernels")


def _capability_verdict(hardware: Hardware, what: str, needed: tuple[int, int], units: str) -> Verdict:
    capability = hardware.capability or (0, 0)
    have = f"{hardware.name} is {hardware.generation}, capability {capability[0]}.{capability[1]}"
    if capability >= needed:
        return Verdict(True, f"{have}: {what} {units} start at {needed[0]}.{needed[1]}")
    return Verdict(False, f"{have}; {what} {units} start at {needed[0]}.{needed[1]}")


def _cpu_verdict(hardware: Hardware, number_format: str) -> Verdict:
    if number_format in hardware.cpu_formats:
        return Verdict(True, f"this CPU ({hardware.name}) multiplies {number_format} in hardware")
    return Verdict(False, f"this CPU ({hardware.name}) has no {number_format} instructions; it would be emulated")

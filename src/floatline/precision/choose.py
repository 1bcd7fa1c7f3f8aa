"""Pick or check a policy for a device, with the reason as text.

`auto` follows what the hardware multiplies natively: bf16 where there are bf16 units (compute capability 8.0, CPUs with
bf16 instructions), else fp16 with loss scaling on GPUs, else fp32. Emulated bf16 (T4, V100, P100) is never
chosen: it runs, slower than fp32. Nor is fp8 ever chosen: it is quicker for large layers only, and what it costs in
accuracy depends on the model; measure it (`floatline.audit.fp8`) and ask for it by name.

Asked for, fp8 runs wherever bf16 does. Where there are no fp8 units (CPUs, GPUs below 8.9) its products are emulated in
fp32, with the reason: the numbers of fp8, slower than bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from floatline.errors import PrecisionError
from floatline.hardware import Hardware, format_verdict, fp8_emulated
from floatline.precision.policy import BASES, Policy, split_policy


@dataclass(frozen=True)
class Choice:
    """A policy and why it is the one."""

    policy: Policy
    reason: str


def choose(hardware: Hardware) -> Choice:
    """Return the best precision for training on `hardware`, with the reason.

    Examples: H200 -> bf16-mixed, T4 and P100 -> 16-mixed, a CPU without bf16 instructions -> 32-true.
    """
    bf16 = format_verdict(hardware, "bf16")
    if bf16:
        return Choice(Policy("bf16-mixed"), f"{bf16.reason}; bf16 has fp32's range and needs no loss scaling")
    fp16 = format_verdict(hardware, "fp16")
    if fp16 and hardware.kind == "cuda":
        return Choice(Policy("16-mixed"), f"{bf16.reason}, so bf16 would be emulated; fp16 with loss scaling instead")
    return Choice(Policy("32-true"), f"{bf16.reason}; fp32 needs no care and nothing faster is at hand")


def resolve(precision: str | Policy, hardware: Hardware) -> Choice:
    """Turn what the user asked for into a legal policy for `hardware`.

    Args:
        precision: A policy, its string, or "auto" (optionally with rules: "auto; lm_head=32").
        hardware: The device that is to run it.

    Raises:
        PrecisionError: Malformed, or illegal on this hardware; names the next best choice.
    """
    if isinstance(precision, Policy):
        name, rules = precision.name, precision.rules
    else:
        name, rules = split_policy(precision)
    if name == "auto":
        choice = choose(hardware)
        return Choice(Policy(choice.policy.name, rules), choice.reason)
    policy = Policy(name, rules)
    return Choice(policy, _check(policy, hardware))


def _check(policy: Policy, hardware: Hardware) -> str:
    emulated = _emulated(hardware) if policy.base.compute == "fp8" else []
    formats = sorted(policy.formats - {"fp8"})
    if hardware.kind == "cpu":  # torch's CPU kernels take all of them; slow is not wrong
        slow = [verdict.reason for fmt in formats if not (verdict := format_verdict(hardware, fmt))]
        return "; ".join(["asked for", *slow, *emulated])
    for number_format in formats:
        verdict = format_verdict(hardware, number_format)
        if not verdict:
            raise PrecisionError(f"{policy} cannot run on {hardware.name}: {verdict.reason}", hint=_instead(hardware))
    return "; ".join(["asked for", *emulated])


def _emulated(hardware: Hardware) -> list[str]:
    why = fp8_emulated(hardware)
    return [f"{why}, so fp8 products are emulated in fp32: fp8's numbers, slower than bf16"] if why else []


def _instead(hardware: Hardware) -> str:
    choice = choose(hardware)
    return f"use precision={choice.policy} ({choice.reason})"


def legal_names(hardware: Hardware) -> list[tuple[str, bool, str]]:
    """Return (name, legal, reason) for every precision name on `hardware`, for `floatline doctor`."""
    rows = []
    for name in BASES:
        try:
            rows.append((name, True, resolve(name, hardware).reason.removeprefix("asked for").lstrip("; ")))
        except PrecisionError as error:
            rows.append((name, False, error.message))
    return rows

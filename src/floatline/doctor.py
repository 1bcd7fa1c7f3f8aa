"""What this machine can do, and why: for `floatline doctor`."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import Any

from floatline.hardware import Hardware, attention_verdict, format_verdict, resolve
from floatline.precision import choose, legal_names

_OPTIONAL = {
    "transformers": "train from recipes",
    "torchdata": "train from recipes, resumably",
    "tensorboard": "training curves as events",
    "matplotlib": "plots in reports",
    "jinja2": "HTML reports",
}
_KERNELS = ("math", "efficient", "flash", "cudnn", "flex", "flash-attn-2", "flash-attn-3")


def diagnose_machine(name: str = "auto") -> dict[str, Any]:
    """Return facts about a device as plain values.

    Args:
        name: "auto" for this machine, "cpu", or a name of the hardware catalog.

    Raises:
        ConfigError: The name is not in the catalog.
    """
    hardware = resolve(name)
    choice = choose(hardware)
    return {
        "hardware": _hardware_facts(hardware),
        "formats": {f: _verdict(format_verdict(hardware, f)) for f in ("fp32", "tf32", "fp16", "bf16", "fp8")},
        "precisions": {name: {"ok": ok, "reason": reason} for name, ok, reason in legal_names(hardware)},
        "attention": {kernel: _verdict(attention_verdict(hardware, kernel)) for kernel in _KERNELS},
        "auto": {"precision": str(choice.policy), "reason": choice.reason},
        "packages": _packages(),
    }


def _hardware_facts(hardware: Hardware) -> dict[str, Any]:
    return {
        "name": hardware.name,
        "kind": hardware.kind,
        "generation": hardware.generation,
        "capability": hardware.capability,
        "memory_bytes": hardware.memory,
        "tflops": hardware.tflops,
        "bandwidth": hardware.bandwidth,
        "note": hardware.note,
    }


def _verdict(verdict: Any) -> dict[str, Any]:
    return {"ok": verdict.ok, "reason": verdict.reason}


def _packages() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"torch": {"version": version("torch"), "for": "everything"}}
    for name, purpose in _OPTIONAL.items():
        installed = importlib.util.find_spec(name) is not None
        found[name] = {"version": version(name) if installed else None, "for": purpose}
    return found


def doctor_text(facts: dict[str, Any]) -> str:
    """Return the facts as text for a terminal."""
    hardware = facts["hardware"]
    capability = "" if not hardware["capability"] else ", capability {}.{}".format(*hardware["capability"])
    lines = [
        f"{hardware['name']}: {hardware['generation']}{capability}, {hardware['memory_bytes'] / 2**30:.1f} GiB",
        f"precision auto = {facts['auto']['precision']}  ({facts['auto']['reason']})",
    ]
    for title in ("formats", "precisions", "attention"):
        lines += ["", title]
        lines += [_line(name, entry["ok"], entry["reason"]) for name, entry in facts[title].items()]
    lines += ["", "packages"]
    for name, entry in facts["packages"].items():
        lines.append(_line(name, entry["version"] is not None, f"{entry['version'] or 'missing'}: {entry['for']}"))
    return "\n".join(lines)


def _line(name: str, ok: bool, reason: str) -> str:
    return f"  {'yes' if ok else 'no ':3}  {name:23}{'  ' + reason if reason else ''}"

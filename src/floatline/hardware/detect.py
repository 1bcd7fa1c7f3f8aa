"""What this machine is: the GPU that torch sees, else the CPU with its half-precision instructions."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch

from floatline.errors import ConfigError
from floatline.hardware.catalog import CATALOG, MIB, Hardware, lookup


@cache
def detect() -> Hardware:
    """Return this machine's first CUDA device, or its CPU when there is none."""
    return _detect_cuda(0) if torch.cuda.is_available() else _detect_cpu()


def resolve(name: str | Hardware = "auto") -> Hardware:
    """Turn a hardware name into facts: "auto" is this machine, "cpu" its processor, else the catalog.

    Raises:
        ConfigError: The name is not in the catalog, or not a name.
    """
    if isinstance(name, Hardware):
        return name
    if not isinstance(name, str):
        raise ConfigError(f"hardware is {name!r}", hint='give a name ("t4", "cpu", "auto") or a Hardware')
    if name == "auto":
        return detect()
    if name == "cpu":
        return _detect_cpu()
    return lookup(name)


def _detect_cuda(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    twin = _nearest_entry(capability, properties.total_memory)
    return Hardware(
        name=properties.name,
        capability=capability,
        memory=properties.total_memory,
        tflops=twin.tflops if twin else {},
        bandwidth=twin.bandwidth if twin else 0.0,
        context=twin.context if twin else 600 * MIB,
        note="" if twin else "not in the catalog: rates unknown, context assumed 600 MiB",
    )


def _nearest_entry(capability: tuple[int, int], memory: int) -> Hardware | None:
    same = [entry for entry in CATALOG.values() if entry.capability == capability]
    close = [entry for entry in same if abs(entry.memory - memory) < 0.1 * entry.memory]
    return min(close, key=lambda entry: abs(entry.memory - memory), default=None)


@cache
def _detect_cpu() -> Hardware:
    return Hardware(name=cpu_name(), kind="cpu", memory=_system_memory(), cpu_formats=_cpu_formats(_cpu_flags()))


def cpu_name() -> str:
    """Return the processor's model name as the system tells it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _cpu_flags() -> frozenset[str]:
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _cpu_formats(flags: frozenset[str]) -> frozenset[str]:
    """Half formats with matmul instructions: x86 names them avx512_bf16/amx_bf16/..., Arm bf16 and asimdhp."""
    native = {
        "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
        "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"},
    }
    return frozenset(name for name, needed in native.items() if flags & needed)


def _system_memory() -> int:
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")), 0)

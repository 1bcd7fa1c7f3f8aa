"""What known GPUs can do: published facts as data.

`visible` memory is what torch reports as `total_memory` in public logs; it varies with driver and ECC, so callers let
users override it. Rates are dense TFLOPS with fp32 accumulation as the vendor publishes them; `context` is what the
CUDA context and libraries take outside of torch's allocator, read from public out-of-memory logs (in use - allocated
- reserved). Where public figures span a range, the catalog keeps the smaller memory and the larger context, so that a
plan errs on the safe side.

Not covered: several GPUs of one kind in one node, MIG slices, and rates that a power limit takes away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from floatline.errors import ConfigError, did_you_mean

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device that a step can run on.

    Args:
        name: Catalog key or the device's own name.
        kind: "cuda" or "cpu".
        capability: CUDA compute capability as (major, minor); None on CPU.
        memory: Bytes that torch can see.
        tflops: Dense rate in TFLOP/s by number format; formats that are absent have no fast path.
        bandwidth: Memory bandwidth in bytes/s, 0 when unknown.
        context: Bytes taken outside of torch's allocator by context and libraries.
        cpu_formats: Half formats that the CPU multiplies in hardware.
        note: Why something about this entry is unusual.
    """

    name: str
    kind: str = "cuda"
    capability: tuple[int, int] | None = None
    memory: int = 0
    tflops: dict[str, float] = field(default_factory=dict, hash=False)
    bandwidth: float = 0.0
    context: int = 0
    cpu_formats: frozenset[str] = frozenset()
    note: str = ""

    @property
    def generation(self) -> str:
        """Marketing name of the architecture, e.g. "Turing"; "CPU" for processors."""
        return _generation(self.capability) if self.capability else "CPU"


def _generation(capability: tuple[int, int]) -> str:
    if capability in {(7, 5), (8, 9)}:
        return {(7, 5): "Turing", (8, 9): "Ada"}[capability]
    majors = {6: "Pascal", 7: "Volta", 8: "Ampere", 9: "Hopper", 10: "Blackwell", 12: "Blackwell"}
    return majors.get(capability[0], f"sm_{capability[0]}{capability[1]}")


def _gpu(
    name: str,
    capability: tuple[int, int],
    memory_gib: float,
    rates: dict[str, float],
    gbps: float,
    context_gib: float,
) -> Hardware:
    return Hardware(
        name=name,
        capability=capability,
        memory=int(memory_gib * GIB),
        tflops=rates,
        bandwidth=gbps * 1e9,
        context=int(context_gib * GIB),
    )


def _rates(fp32: float, tf32: float = 0, fp16: float = 0, bf16: float = 0, fp8: float = 0) -> dict[str, float]:
    known = {"fp32": fp32, "tf32": tf32, "fp16": fp16, "bf16": bf16, "fp8": fp8}
    return {name: rate for name, rate in known.items() if rate}


_A100 = _rates(19.5, 156, 312, 312)
_H100 = _rates(67, 494, 989, 989, 1979)

_GPUS = [
    _gpu("p100-16gb", (6, 0), 16280 / 1024, _rates(9.5, fp16=19.05), 732, 0.38),
    _gpu("v100-16gb", (7, 0), 16130 / 1024, _rates(15.7, fp16=125), 900, 0.38),
    _gpu("v100-32gb", (7, 0), 31.73, _rates(15.7, fp16=125), 900, 0.38),
    _gpu("t4", (7, 5), 14.56, _rates(8.1, fp16=65), 320, 0.14),
    _gpu("a10g", (8, 6), 22.06, _rates(31.2, 35, 70, 70), 600, 0.35),
    _gpu("l4", (8, 9), 22.03, _rates(30.3, 60, 121, 121, 242), 300, 0.35),
    _gpu("rtx-3090", (8, 6), 23.5, _rates(35.6, 35.6, 71, 71), 936, 0.47),
    _gpu("rtx-4090", (8, 9), 23.5, _rates(82.6, 82.6, 165, 165, 330), 1008, 0.47),
    _gpu("rtx-5090", (12, 0), 31.36, _rates(105, 0, 210, 210), 1792, 0.49),
    _gpu("a100-40gb", (8, 0), 39.38, _A100, 1555, 0.53),
    _gpu("a100-80gb", (8, 0), 79.14, _A100, 2039, 0.75),
    _gpu("h100-80gb", (9, 0), 79.14, _H100, 3350, 0.75),
    _gpu("h200", (9, 0), 139.72, _H100, 4800, 0.66),
    _gpu("b200", (10, 0), 178.35, _rates(80, 1125, 2250, 2250, 4500), 8000, 0.70),
]

CATALOG: dict[str, Hardware] = {gpu.name: gpu for gpu in _GPUS}
ALIASES = {
    "p100": "p100-16gb",
    "v100": "v100-16gb",
    "a100": "a100-40gb",
    "h100": "h100-80gb",
    "3090": "rtx-3090",
    "4090": "rtx-4090",
    "5090": "rtx-5090",
}


def lookup(name: str) -> Hardware:
    """Return the catalog entry for a GPU name or alias, e.g. "t4", "a100-40gb", "h200".

    Raises:
        ConfigError: The name is not in the catalog.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = ALIASES.get(key, key)
    if key not in CATALOG:
        known = ["auto", "cpu", *CATALOG]
        raise ConfigError(f"unknown hardware {name!r}", hint=did_you_mean(key, known))
    return CATALOG[key]

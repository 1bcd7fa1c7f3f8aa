"""How long an update takes, by a roofline: a model for comparing techniques, not a stopwatch.

Each op takes the longest of three times: its FLOPs at the GPU's rate for its number format, its bytes at the memory's
bandwidth, and the launch of a kernel. What offload moves over the bus runs beside the computation, so only what takes
longer than that counts. Rates are the vendor's dense figures times the share of them that large products reach.

The absolute seconds are a lower bound in spirit: small matrices, eager Python between kernels and data loading are not
in it. Ratios between two plans of one model on one GPU are what it is for.
Source: Williams, Waterman, Patterson, Roofline (CACM 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from floatline.hardware import Hardware
from floatline.observe.events import Trace

MATRIX_SHARE = 0.7
"""Share of the published rate that large products reach: 769 to 798 of 989 TFLOP/s on H200, 271 of 312 on A100."""
BANDWIDTH_SHARE = 0.85
"""Share of the published bandwidth that a copy reaches: 4.3 of 4.8 TB/s on H200."""
LAUNCH_SECONDS = 5e-6
"""A kernel launch from eager PyTorch; shorter kernels wait for it."""
_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp32"}
_FORMATS |= {"float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
_BUS = {6: 12e9, 7: 12e9, 8: 24e9, 9: 50e9, 10: 50e9, 12: 50e9}
"""Bytes/s over PCIe 3, 4 and 5 x16, by major compute capability."""
_CPU_FLOPS, _CPU_BANDWIDTH = 5e11, 2e10


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """Seconds of one update by the roofline.

    Attributes:
        seconds: In all.
        compute: Of which bound by arithmetic.
        memory: Bound by bandwidth.
        launch: Bound by launching kernels.
        bus: Beyond the computation, for what moves to and from the host.
    """

    seconds: float
    compute: float
    memory: float
    launch: float
    bus: float


def update_time(trace: Trace, hardware: Hardware) -> UpdateTime:
    """Return how long the last update of a trace takes on `hardware`."""
    bandwidth = hardware.bandwidth * BANDWIDTH_SHARE or _CPU_BANDWIDTH
    spent = {"compute": 0.0, "memory": 0.0, "launch": 0.0}
    for (_, _, dtype, _, _), cost in trace.costs.items():
        times = {
            "compute": cost.flops / rate_of(hardware, dtype),
            "memory": cost.nbytes / bandwidth,
            "launch": cost.calls * LAUNCH_SECONDS if hardware.kind == "cuda" else 0.0,
        }
        longest = max(times, key=lambda name: times[name])
        spent[longest] += times[longest]
    busy = sum(spent.values())
    bus = max(0.0, _moved(trace) / bus_rate(hardware) - busy)
    return UpdateTime(seconds=busy + bus, bus=bus, **spent)


def rate_of(hardware: Hardware, dtype: str) -> float:
    """Return FLOP/s of matrix products in a torch dtype; formats without units of their own run at fp32's rate.

    fp32 is taken as fp32: torch multiplies it in tf32 only when asked to.
    """
    rates = hardware.tflops
    tflops = rates.get(_FORMATS.get(dtype, "fp32")) or rates.get("fp32")
    return tflops * 1e12 * MATRIX_SHARE if tflops else _CPU_FLOPS


def bus_rate(hardware: Hardware) -> float:
    """Return bytes/s between device and host, in one direction."""
    return _BUS.get((hardware.capability or (8, 0))[0], 24e9)


def _moved(trace: Trace) -> int:
    """Return the bytes that one update sends to the host; as many come back, in the other direction."""
    last = len(trace.begins) - 1
    return sum(trace.storages[number].nbytes for number, nbytes in trace.host_events
               if nbytes > 0 and trace.storages[number].update == last)  # fmt: skip


def assumptions(hardware: Hardware) -> list[str]:
    """Return what the times rest on, as sentences for a report."""
    if hardware.kind == "cpu":
        return [f"time is a roofline model: {_CPU_FLOPS / 1e9:.0f} GFLOP/s and {_CPU_BANDWIDTH / 1e9:.0f} GB/s assumed"]
    rates = ", ".join(f"{name} {value:g}" for name, value in hardware.tflops.items())
    return [
        f"time is a roofline model, for comparing plans: {MATRIX_SHARE:.0%} of the published dense TFLOP/s ({rates}), "
        f"{BANDWIDTH_SHARE:.0%} of {hardware.bandwidth / 1e9:.0f} GB/s, {LAUNCH_SECONDS * 1e6:.0f} µs a kernel, "
        f"{bus_rate(hardware) / 1e9:.0f} GB/s to the host; data loading and Python are not in it"
    ]

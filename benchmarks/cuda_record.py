"""What plan_accuracy_cuda.py records, how it is judged, and how it is computed again without the GPU.

A record (JSON) holds the card's facts and, for each row, the workload as data: bundled model, shape, precision,
techniques. So a test on a CPU makes the estimate for that card anew and holds it against the peaks that were measured:

    rows     {"setting": ..., "said": ..., "measured": {"allocated", "reserved", "outside"}, "failure": ""}
    cards    {"setting": ..., "card": ..., "said": ..., "ran": true, "failure": ""}: a smaller card, imitated

"said" are the figures of `figures`. Nothing here touches CUDA.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from floatline.hardware import Hardware

LIMITS = {"allocated, median": 0.02, "allocated, worst": 0.06, "reserved, median": 0.05}
"""What the absolute errors are held to, as shares."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One workload as data.

    Args:
        model: Name of a bundled model.
        shape: Sizes of the batch, as for `Shape`.
        precision: A policy's string, or "half-mixed" and "half-true" for the half format that a card multiplies.
        techniques: Texts.
        max_grad_norm: As for `TrainStep`.
    """

    model: str
    shape: dict[str, Any]
    precision: str = "half-mixed"
    techniques: tuple[str, ...] = ()
    max_grad_norm: float | None = 1.0

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key} {value}" for key, value in self.shape.items())
        return ", ".join([f"{self.model} {sizes}", self.precision, *self.techniques])

    def on(self, hardware: Hardware) -> Setting:
        """Return the setting with the half format named: bf16 where the card has it, else fp16."""
        half = "bf16" if (hardware.capability or (0, 0)) >= (8, 0) else "16"
        return Setting(**{**asdict(self), "precision": self.precision.replace("half", half)})


def setting_of(facts: dict[str, Any]) -> Setting:
    """Read a setting back from JSON."""
    shape = {key: tuple(value) if isinstance(value, list) else value for key, value in facts["shape"].items()}
    return Setting(**{**facts, "shape": shape, "techniques": tuple(facts["techniques"])})


def hardware_facts(hardware: Hardware) -> dict[str, Any]:
    """Return a device's facts as plain values for JSON."""
    return {**asdict(hardware), "cpu_formats": sorted(hardware.cpu_formats)}


def hardware_of(facts: dict[str, Any]) -> Hardware:
    """Read a device's facts back."""
    capability = tuple(facts["capability"]) if facts["capability"] else None
    return Hardware(**{**facts, "capability": capability, "cpu_formats": frozenset(facts["cpu_formats"])})


def work_of(setting: Setting) -> Any:
    """Return the workload; weights are made in the format in which they are trained, so that none is converted."""
    from floatline.plan.shape import Shape
    from floatline.plan.sources import load_source

    dtype = torch.bfloat16 if setting.precision == "bf16-true" else torch.float32
    return load_source(setting.model, Shape(**setting.shape), dtype=dtype).work


def figures(setting: Setting, hardware: Hardware) -> dict[str, Any]:
    """Return the estimate for a setting on a device: its peaks, and between which bytes the true need lies."""
    from floatline import estimate

    torch.set_num_threads(1)
    found = estimate(
        work_of(setting), hardware, setting.precision, setting.techniques, max_grad_norm=setting.max_grad_norm
    )
    low, high = found.fit.band
    return {
        "allocated": found.peak_allocated,
        "reserved": found.peak_reserved,
        "total": found.peak_total,
        "needed": found.fit.needed,
        "low": low,
        "high": high,
        "capacity": found.fit.capacity,
        "chance": found.fit.chance,
        "verdict": found.verdict,
        "peak_op": found.timeline.op,
        "peak_module": found.timeline.module,
        "categories": found.categories,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def error(row: dict[str, Any], what: str) -> float:
    """Return said / measured - 1 of "allocated" or "reserved"."""
    return float(row["said"][what] / row["measured"][what] - 1)


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return median and worst of the absolute errors, those of `LIMITS` among them; empty without measurements."""
    good = [row for row in rows if row.get("measured")]
    if not good:
        return {}
    found = {}
    for what in ("allocated", "reserved"):
        errors = [abs(error(row, what)) for row in good]
        found[f"{what}, median"], found[f"{what}, worst"] = statistics.median(errors), max(errors)
    return found


def missed(found: dict[str, float]) -> list[str]:
    """Return which limits were missed, as sentences."""
    return [
        f"{name} is {found[name]:.2%}, the limit {limit:.0%}"
        for name, limit in LIMITS.items()
        if found.get(name, 0.0) > limit
    ]


def contradiction(row: dict[str, Any]) -> str:
    """Return how a run on an imitated card contradicts what was said of it; "" where it does not.

    What is said to fit must run; what is over the card's memory even at the band's lower end must not.
    """
    said = row["said"]
    if said["verdict"] == "fits" and not row["ran"]:
        return "was said to fit, and ran out of memory"
    if said["low"] > said["capacity"] and row["ran"]:
        return f"was said to need {said['low'] / 2**30:.2f} GiB or more of {said['capacity'] / 2**30:.2f}, and ran"
    return ""


def compare(record: dict[str, Any], rows: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Return rows of a record with the estimate made anew, for the card that the record is of.

    Args:
        record: A file of benchmarks/results/plan_cuda_*.json.
        rows: Those to compute; all that were measured without them.
    """
    hardware = hardware_of(record["hardware"])
    chosen = rows if rows is not None else [row for row in record["rows"] if row.get("measured")]
    return [{**row, "said": figures(setting_of(row["setting"]), hardware)} for row in chosen]

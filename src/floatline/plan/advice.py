"""Where nothing fits: what would. The smallest GPU, the number of GPUs, or adapters on a frozen base.

Each is tried the same way as everything else, by tracing the step; the first that fits is told. The catalog is gone
through from the smallest card up, numbers of GPUs by doubling, ranks of adapters from large to small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from floatline.errors import FloatlineError
from floatline.hardware import CATALOG
from floatline.plan.estimate import Estimate
from floatline.plan.search import Found
from floatline.techniques import Technique, fake_ranks, make_technique

RANKS = (64, 16, 4)
MOST_GPUS = 64


@dataclass(frozen=True, kw_only=True)
class Advice:
    """One way to make it fit.

    Attributes:
        kind: "gpu", "gpus" or "adapter".
        text: As a sentence.
        techniques: With which techniques.
        needed: Bytes that a device then needs.
        capacity: Bytes that it has.
    """

    kind: str
    text: str
    techniques: tuple[str, ...]
    needed: int
    capacity: int


def advise(found: Found, attempt: Callable[..., Estimate]) -> list[Advice]:
    """Return what would fit, at most one piece of each kind."""
    pieces = [_adapter(found, attempt), _larger(found, attempt), _more(found, attempt)]
    return [piece for piece in pieces if piece is not None]


def _larger(found: Found, attempt: Callable[..., Estimate]) -> Advice | None:
    """The smallest GPU of the catalog; those that cannot hold what this one needs are passed over untried."""
    here = found.estimate.hardware
    for gpu in sorted(CATALOG.values(), key=lambda gpu: (gpu.memory, gpu.capability)):
        if gpu.memory <= here.memory or gpu.memory < 0.9 * found.estimate.peak_total:
            continue
        estimate = _tried(attempt, found.techniques, hardware=gpu, precision="auto")
        if estimate is not None and estimate.fit:
            return _piece("gpu", f"{gpu.name} in {estimate.precision}", found.techniques, estimate)
    return None


def _more(found: Found, attempt: Callable[..., Estimate]) -> Advice | None:
    """As few of this GPU as hold shards of it all."""
    techniques = [t for t in found.techniques if t.name not in ("optimizer_offload", "low_bit_optimizer")]
    if any(technique.name == "sharding" for technique in techniques):
        return None
    count = 2
    while count <= MOST_GPUS:
        with fake_ranks(count):
            estimate = _tried(attempt, [*techniques, make_technique("sharding")])
        if estimate is None:
            return None
        if estimate.fit:
            text = f"{count} x {found.estimate.hardware.name} sharded by FSDP2, each with this batch"
            return _piece("gpus", text, [*techniques, make_technique("sharding")], estimate)
        count *= 2
    return None


def _adapter(found: Found, attempt: Callable[..., Estimate]) -> Advice | None:
    """The largest rank of adapters, the base frozen."""
    if any(technique.name in ("lora", "freezing") for technique in found.techniques):
        return None
    others = [t for t in found.techniques if t.name not in ("optimizer_offload", "low_bit_optimizer")]
    fits: Advice | None = None
    for rank in (max(RANKS), min(RANKS), *sorted(RANKS[1:-1])):  # where the smallest does not fit, none does
        techniques = [*others, make_technique("lora", {"rank": rank})]
        estimate = _tried(attempt, techniques)
        if estimate is None or (rank == min(RANKS) and not estimate.fit):
            return None
        if estimate.fit:
            fits = _piece("adapter", f"LoRA of rank {rank} on the frozen model", techniques, estimate)
        if fits and rank != min(RANKS):
            return fits
    return fits


def _tried(attempt: Callable[..., Estimate], techniques: Sequence[Technique], **changes: Any) -> Estimate | None:
    try:
        return attempt(techniques, **changes)
    except FloatlineError:
        return None


def _piece(kind: str, text: str, techniques: Sequence[Technique], estimate: Estimate) -> Advice:
    return Advice(
        kind=kind,
        text=text,
        techniques=tuple(map(str, techniques)),
        needed=estimate.fit.needed,
        capacity=estimate.fit.capacity,
    )

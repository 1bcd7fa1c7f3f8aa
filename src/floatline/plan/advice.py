"""Where nothing fits: what would. The smallest GPU, the number of GPUs, or adapters on a frozen base.

Each is tried the same way as everything else, by tracing the step; the first that fits is told. The catalog is gone
through from the smallest card up, numbers of GPUs by doubling, ranks of adapters from large to small. The three
searches do not depend on each other, so helpers (parallel.py) can work on one while another goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from floatline.errors import FloatlineError
from floatline.hardware import CATALOG, Hardware
from floatline.plan.estimate import Estimate
from floatline.plan.parallel import Alone, Piece, together
from floatline.plan.search import Found
from floatline.plan.trial import Trial
from floatline.techniques import Technique, make_technique

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


class Asking(Protocol):
    """What makes trials and their estimates (plan.py: `Trials`)."""

    helpers: Alone

    def trial(
        self,
        techniques: Sequence[Technique | str],
        hardware: Hardware | None = None,
        precision: str | None = None,
        ranks: int | None = None,
    ) -> Trial:
        """Return the trial of techniques, on the plan's device or another, or on several."""

    def ask(self, trial: Trial) -> Estimate:
        """Return the estimate of a trial."""


def advise(found: Found, asking: Asking) -> list[Advice]:
    """Return what would fit, at most one piece of each kind."""
    pieces = [_adapter(found, asking), _larger(found, asking), _more(found, asking)]
    return [piece for piece in together(pieces, asking.ask, asking.helpers) if piece is not None]


def _larger(found: Found, asking: Asking) -> Piece[Advice | None]:
    """The smallest GPU of the catalog; those that cannot hold what this one needs are passed over untried."""
    here = found.estimate.hardware
    for gpu in sorted(CATALOG.values(), key=lambda gpu: (gpu.memory, gpu.capability)):
        if gpu.memory <= here.memory or gpu.memory < 0.9 * found.estimate.peak_total:
            continue
        with suppress(FloatlineError):
            estimate = yield (asking.trial(found.techniques, hardware=gpu, precision="auto"),)
            if estimate.fit:
                return _piece("gpu", f"{gpu.name} in {estimate.precision}", found.techniques, estimate)
    return None


def _more(found: Found, asking: Asking) -> Piece[Advice | None]:
    """As few of this GPU as hold shards of it all."""
    techniques = [t for t in found.techniques if t.name not in ("optimizer_offload", "low_bit_optimizer")]
    if any(technique.name == "sharding" for technique in techniques):
        return None
    techniques.append(make_technique("sharding"))
    counts = [2**power for power in range(1, MOST_GPUS.bit_length())]
    for position, count in enumerate(counts):
        maybe = [asking.trial(techniques, ranks=more) for more in counts[position : position + 2]]
        try:
            estimate = yield tuple(maybe)
        except FloatlineError:
            return None
        if estimate.fit:
            text = f"{count} x {found.estimate.hardware.name} sharded by FSDP2, each with this batch"
            return _piece("gpus", text, techniques, estimate)
    return None


def _adapter(found: Found, asking: Asking) -> Piece[Advice | None]:
    """The largest rank of adapters, the base frozen."""
    if any(technique.name in ("lora", "freezing") for technique in found.techniques):
        return None
    others = [t for t in found.techniques if t.name not in ("optimizer_offload", "low_bit_optimizer")]
    fits: Advice | None = None
    for rank in (max(RANKS), min(RANKS), *sorted(RANKS[1:-1])):  # where the smallest does not fit, none does
        techniques = [*others, make_technique("lora", {"rank": rank})]
        try:
            estimate = yield (asking.trial(techniques),)
        except FloatlineError:
            return None
        if rank == min(RANKS) and not estimate.fit:
            return None
        if estimate.fit:
            fits = _piece("adapter", f"LoRA of rank {rank} on the frozen model", techniques, estimate)
        if fits and rank != min(RANKS):
            return fits
    return fits


def _piece(kind: str, text: str, techniques: Sequence[Technique], estimate: Estimate) -> Advice:
    return Advice(
        kind=kind,
        text=text,
        techniques=tuple(map(str, techniques)),
        needed=estimate.fit.needed,
        capacity=estimate.fit.capacity,
    )

"""The memory curve of an update: bytes by category at each change, and what stands at the peak."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from floatline.observe.events import Category, Phase, Storage, Trace

MOST_POINTS = 2000


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The curve over one update.

    Attributes:
        points: Index of the event behind each point; at most 2000, the peak always among them.
        curves: Category -> bytes alive at each point.
        phases: (phase, point where it begins), in their order.
        peak: Position of the peak in `points`.
        peak_bytes: Bytes alive there.
        op: The op that reached the peak.
        module: The module it belongs to ("" at the top).
        phase: The phase it falls in.
        largest: (module, op, category, bytes) of the largest storages alive at the peak.
    """

    points: tuple[int, ...]
    curves: dict[str, tuple[int, ...]]
    phases: tuple[tuple[str, int], ...]
    peak: int
    peak_bytes: int
    op: str
    module: str
    phase: str
    largest: tuple[tuple[str, str, str, int], ...]

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak; categories that hold nothing are left out."""
        return {name: curve[self.peak] for name, curve in self.curves.items() if curve[self.peak]}


def timeline_of(trace: Trace) -> Timeline:
    """Return the curve of the trace's last update (its peak is the whole trace's where that update reaches it)."""
    begin = trace.begins[-1] if trace.begins else 0
    live: dict[int, Storage] = {}
    total = best = 0
    peak = begin
    for index, (_, nbytes) in enumerate(trace.events):
        total += nbytes
        if index >= begin and total > best:
            best, peak = total, index
    kept = _points(begin, len(trace.events), peak)
    curves: dict[str, list[int]] = {category.value: [] for category in Category}
    now: dict[str, int] = defaultdict(int)
    phases: list[tuple[str, int]] = []
    largest: list[Storage] = []
    wanted = iter(kept)
    next_point = next(wanted)
    for index, (number, nbytes) in enumerate(trace.events):
        made = trace.storages[number]
        now[made.category.value] += nbytes
        if nbytes > 0:
            live[number] = made
        else:
            live.pop(number, None)
        if index == peak:
            largest = sorted(live.values(), key=lambda storage: -storage.nbytes)[:12]
        if index == next_point:
            for name, curve in curves.items():
                curve.append(now[name])
            if nbytes > 0 and made.phase is not Phase.START and (not phases or phases[-1][0] != made.phase.value):
                phases.append((made.phase.value, len(curves[name]) - 1))
            next_point = next(wanted, -1)
    at = trace.storages[trace.events[peak][0]] if trace.events else None
    return Timeline(
        points=tuple(kept),
        curves={name: tuple(curve) for name, curve in curves.items() if any(curve)},
        phases=tuple(phases),
        peak=kept.index(peak),
        peak_bytes=best,
        op=at.op if at else "",
        module=at.module if at else "",
        phase=at.phase.value if at else "",
        largest=tuple((s.module, s.op, s.category.value, s.nbytes) for s in largest),
    )


def _points(begin: int, end: int, peak: int) -> list[int]:
    """Return the indices to keep: evenly spread, and the peak."""
    step = max(1, (end - begin) // MOST_POINTS + 1)
    return sorted({*range(begin, end, step), peak, end - 1})

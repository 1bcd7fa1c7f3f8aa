from __future__ import annotations

import pytest
from small_work import blocks

from floatline.observe.events import peak_of
from floatline.observe.trace import trace
from floatline.plan.timeline import MOST_POINTS, timeline_of


@pytest.fixture(scope="module")
def seen():
    return trace(blocks(), hardware="a100", precision="bf16-mixed")


def test_the_curve_ends_and_peaks_as_the_events_do(seen):
    line = timeline_of(seen)
    totals = [sum(curve[at] for curve in line.curves.values()) for at in range(len(line.points))]
    assert max(totals) == totals[line.peak] == line.peak_bytes == peak_of(seen.events)[0]
    assert totals[-1] == sum(nbytes for _, nbytes in seen.events)
    assert sum(line.at_peak.values()) == line.peak_bytes


def test_the_peak_has_a_place(seen):
    line = timeline_of(seen)
    assert line.op.startswith("aten.") and line.phase in ("forward", "backward", "optimizer")
    assert line.largest == tuple(sorted(line.largest, key=lambda entry: -entry[3]))
    assert sum(entry[3] for entry in line.largest) <= line.peak_bytes


def test_phases_come_in_the_order_of_an_update(seen):
    names = [name for name, _ in timeline_of(seen).phases]
    assert names.index("forward") < names.index("backward") < names.index("optimizer")


def test_long_traces_are_thinned_and_keep_their_peak():
    seen = trace(blocks(rows=8, width=16, depth=60), hardware="a100", precision="bf16-mixed")
    assert len(seen.events) - seen.begins[-1] > MOST_POINTS
    line = timeline_of(seen)
    assert len(line.points) <= MOST_POINTS + 2
    assert line.peak_bytes == max(sum(c[i] for c in line.curves.values()) for i in range(len(line.points)))

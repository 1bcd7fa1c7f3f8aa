import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.step import gradient_history
from floatline.step.gradient_history import ABSENT, Point, Points, Rows


def point(step: int, norm: float, bad: bool = False) -> Point:
    if bad:
        return Point(step, 1, math.nan, math.nan, 0, math.nan, math.nan, 1, 2, 5)
    return Point(step, 1, norm, norm, 1, 2 * norm, norm / 2)


def filled(norms: list[float | None], room: int = 8) -> Points:
    points = Points(room)
    for step, norm in enumerate(norms, 1):
        points.add(point(step, norm or 0.0, bad=norm is None))
    return points


@given(st.lists(st.none() | st.floats(0, 1e6), min_size=1, max_size=200), st.sampled_from([2, 4, 8]))
def test_thinning_keeps_spikes_means_and_counts(norms: list[float | None], room: int) -> None:
    points = filled(norms, room)
    assert 1 <= len(points.kept) <= room
    assert points.kept[0].step == 1
    assert points.kept[-1].step + points.kept[-1].updates == len(norms) + 1
    assert sum(p.updates for p in points.kept) == len(norms)
    assert sum(p.bad_updates for p in points.kept) == norms.count(None)
    assert sum(p.bad_elements for p in points.kept) == 5 * norms.count(None)
    fine = [norm for norm in norms if norm is not None]
    if fine:
        assert max(p.top_norm for p in points.kept if p.updates > p.bad_updates) == max(fine)
        assert max(p.largest for p in points.kept if p.looked) == 2 * max(fine)
        total = sum(p.norm * (p.updates - p.bad_updates) for p in points.kept if p.updates > p.bad_updates)
        assert total == pytest.approx(sum(fine), rel=1e-9)
    for kept in points.kept:
        alone = kept.updates == kept.bad_updates
        assert math.isnan(kept.norm) == alone == math.isnan(kept.top_norm) == math.isnan(kept.mean)


def test_an_update_whose_elements_nobody_looked_at() -> None:
    points = filled([1.0, 3.0])
    merged, unseen = points.kept[0], Point(3, 1, 9.0, 9.0)
    merged.merge(unseen)
    assert (merged.norm, merged.looked, merged.largest, merged.mean) == (5.0, 1, 2.0, 0.5)


def test_points_go_through_json() -> None:
    points = filled([1.0, None, 3.0, 2.0, 9.0, 1.0, 1.0, 1.0, 4.0])
    other = Points(8)
    other.load_state_dict(json.loads(json.dumps(points.state_dict())))
    assert json.dumps(other.state_dict()) == json.dumps(points.state_dict())
    for restored in (points, other):
        restored.add(point(10, 2.0))
    assert json.dumps(other.state_dict()) == json.dumps(points.state_dict())


def test_points_with_less_room_are_thinned_further() -> None:
    points = filled([float(step) for step in range(1, 65)], 64)
    small = Points(8)
    small.load_state_dict(points.state_dict())
    assert len(small.kept) <= 8 and sum(p.updates for p in small.kept) == 64
    assert max(p.top_norm for p in small.kept) == 64.0


def test_rows_are_thinned_evenly_and_keep_the_first() -> None:
    rows = Rows(4, every=2)
    for step in range(1, 42):
        if rows.due(step):
            rows.add(step, {"a": float(step), "b": 1.0})
    assert len(rows.kept) <= 4 and rows.steps[0] == 1
    assert {b - a for a, b in zip(rows.steps, rows.steps[1:])} == {rows.every}
    assert rows.steps[-1] + rows.every > 41
    for row, step, following in zip(rows.kept, rows.steps, rows.steps[1:]):
        assert step < row[0] < following  # the larger ones of those that were merged


def test_a_nan_between_two_rows_and_after_thinning_is_still_there() -> None:
    rows = Rows(4, every=10)
    rows.add(1, {"a": 1.0, "b": 1.0})
    rows.add(4, {"a": 1.0, "b": math.nan})
    for step in range(11, 200, 10):
        if rows.due(step):
            rows.add(step, {"a": 2.0, "b": 2.0})
    assert rows.table()[0][0] == 2.0 and math.isnan(rows.table()[0][1])


def test_a_name_that_comes_later_was_absent_before() -> None:
    rows = Rows(4, every=1)
    rows.add(1, {"a": 1.0})
    rows.add(2, {"b": 2.0, "a": 3.0})
    assert rows.names == ["a", "b"]
    assert rows.table() == [[1.0, ABSENT], [3.0, 2.0]]
    other = Rows(4, every=1)
    other.load_state_dict(json.loads(json.dumps(rows.state_dict())))
    for one in (rows, other):
        one.add(3, {"b": 1.0})
    assert other.table() == rows.table() == [[1.0, ABSENT], [3.0, 2.0], [ABSENT, 1.0]]


def test_very_many_names_have_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_history, "MAX_CELLS", 100)
    rows = Rows(50, every=1)
    for step in range(1, 60):
        if rows.due(step):
            rows.add(step, {f"p{place}": 1.0 for place in range(10)})
    assert len(rows.kept) * len(rows.names) <= 100


def test_norms_beyond_fp32_become_infinite() -> None:
    rows = Rows(4, every=1)
    rows.add(1, {"a": 1e39})
    assert rows.table() == [[math.inf]]

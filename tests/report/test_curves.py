import math
import random

import pytest

from floatline.report.curves import quantile, smooth, spans_decades, thin, thin_marks

NAN = math.nan


def test_thin_keeps_every_spike_and_the_ends_of_a_huge_curve() -> None:
    chance = random.Random(0)
    ys = [chance.random() for _ in range(100_000)]
    ys[31_337], ys[77_777] = 50.0, -50.0
    xs, thinned = thin(range(100_000), ys, 900)
    assert len(xs) <= 900
    assert max(thinned) == 50.0 and min(thinned) == -50.0
    assert xs == sorted(xs)
    assert xs[0] < 250 and xs[-1] > 99_750


def test_thin_leaves_a_gap_where_nothing_is_finite() -> None:
    ys = [1.0] * 400 + [NAN] * 200 + [1.0] * 400
    xs, thinned = thin(range(1000), ys, 100)
    gap = [x for x, y in zip(xs, thinned) if math.isnan(y)]
    assert gap and min(gap) >= 400 and max(gap) < 600


@pytest.mark.parametrize("values", [[], [NAN], [math.inf, NAN]])
def test_curves_without_a_finite_value(values: list[float]) -> None:
    assert all(math.isnan(value) for value in smooth(values, 10))
    assert all(math.isnan(value) for value in thin(range(len(values)), values, 10)[1])
    assert math.isnan(quantile(values, 0.5))
    assert not spans_decades(values)


def test_smooth_of_a_constant_is_the_constant_from_its_first_value() -> None:
    assert smooth([NAN, 3.0, NAN, 3.0], 10)[1:] == pytest.approx([3.0, 3.0, 3.0])


def test_marks_are_spread_with_both_ends() -> None:
    marks = thin_marks(range(10_000), 100)
    assert len(marks) == 100
    assert (marks[0], marks[-1]) == (0, 9999)

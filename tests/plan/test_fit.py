from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.hardware import lookup
from floatline.plan.fit import FITS, fit_of

GIB = 2**30
T4 = lookup("t4")


def test_the_chance_is_a_half_where_the_peak_meets_capacity_less_reserve():
    fit = fit_of(T4.memory, 0, T4)
    edge = fit_of(T4.memory - fit.reserve, 0, T4)
    assert edge.chance == pytest.approx(0.5)
    assert edge.verdict == "tight" and not edge


def test_margin_and_band():
    fit = fit_of(10 * GIB, 6 * GIB, T4)
    low, high = fit.band
    assert fit.margin == T4.memory - 10 * GIB
    assert low < 10 * GIB < high
    assert high - 10 * GIB == pytest.approx(1.645 * fit.deviation, rel=1e-3)


def test_what_is_certain_has_no_error():
    assert fit_of(10 * GIB, 10 * GIB, T4).deviation < fit_of(10 * GIB, 0, T4).deviation


@given(st.integers(0, 40 * GIB), st.integers(0, 40 * GIB))
def test_more_never_fits_better(needed, more):
    assert fit_of(needed + more, 0, T4).chance <= fit_of(needed, 0, T4).chance


@given(st.integers(0, 20 * GIB))
def test_nothing_beyond_the_capacity_fits(needed):
    fit = fit_of(needed, 0, T4)
    assert bool(fit) == (fit.verdict == "fits") == (fit.chance >= FITS)
    if fit:
        assert fit.needed + fit.reserve < fit.capacity

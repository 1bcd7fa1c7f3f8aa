import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.step.clip_advice import NormDistribution, advise


def of(norms: list[float]) -> NormDistribution:
    distribution = NormDistribution()
    for norm in norms:
        distribution.add(norm)
    return distribution


@given(st.lists(st.floats(1e-20, 1e20), min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_within_a_bin(norms: list[float], share: float) -> None:
    exact = sorted(norms)[math.ceil(share * len(norms)) - 1]
    assert of(norms).quantile(share) == pytest.approx(exact, rel=0.0222)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.floats(1e-3, 1e6))
def test_shares_are_between_those_a_bin_off(norms: list[float], value: float) -> None:
    share = of(norms).share_above(value)
    assert sum(norm > value * 1.05 for norm in norms) / len(norms) <= share
    assert share <= sum(norm > value / 1.05 for norm in norms) / len(norms)


def log_normal(count: int, middle: float = 0.8, spread: float = 0.3) -> list[float]:
    chance = random.Random(0)
    return [middle * math.exp(chance.gauss(0, spread)) for _ in range(count)]


def test_outliers_make_the_largest_tenth_worth_clipping() -> None:
    advice = advise(of([*log_normal(990), *[30.0] * 10]), 1.0)
    assert advice.suggested == pytest.approx(1.25, abs=0.1)
    assert advice.suggested in [candidate.value for candidate in advice.candidates]
    shares = {candidate.what: candidate.share for candidate in advice.candidates}
    assert shares["half lie below"] == pytest.approx(0.5, abs=0.05)
    assert shares["90 % lie below"] == pytest.approx(0.08, abs=0.025)
    assert shares["in use"] == pytest.approx(0.24, abs=0.04)
    assert "1000 updates: half lie below 0.7" in advice.text and "the largest was 30" in advice.text
    assert "would cut the largest" in advice.text


def test_without_outliers_nothing_need_be_cut() -> None:
    advice = advise(of(log_normal(500, spread=0.1)), None)
    assert "Nothing is clipped." in advice.text and "no outliers" in advice.text
    assert advice.suggested is not None and of(log_normal(500, spread=0.1)).share_above(advice.suggested) == 0


def test_a_value_that_clips_most_updates_is_called_a_learning_rate() -> None:
    text = advise(of(log_normal(500)), 0.1).text
    assert "max_grad_norm=0.1 clips 100 % of them" in text and "the learning rate" in text


def test_a_value_that_clips_nothing() -> None:
    assert "max_grad_norm=50 has clipped none of them" in advise(of(log_normal(500)), 50.0).text


def test_norms_that_fall_or_grow() -> None:
    falling = [10.0] * 400 + [1.0] * 100
    assert "Norms are falling: the last 100 have the median 1" in advise(of(falling), None).text
    assert "Norms are growing" in advise(of(falling[::-1] + [10.0] * 100 + [50.0] * 100), None).text
    assert "Norms are" not in advise(of([1.0] * 500), None).text


def test_too_few_updates_say_so() -> None:
    advice = advise(of([1.0] * 19), 1.0)
    assert advice.suggested is None and advice.candidates == () and advice.text.startswith("19 finite updates so far")


def test_all_zero() -> None:
    advice = advise(of([0.0] * 50), 1.0)
    assert "All norms are zero" in advice.text and advice.suggested is None


def test_it_prints_as_a_table() -> None:
    lines = str(advise(of([*log_normal(990), *[30.0] * 10]), 1.0)).splitlines()
    assert len(lines) == 5 and any("in use" in line and "%" in line for line in lines[1:])


def test_state_goes_on_where_it_was() -> None:
    norms = log_normal(300)
    half, other = of(norms[:150]), NormDistribution()
    other.load_state_dict(half.state_dict())
    for norm in norms[150:]:
        other.add(norm)
    assert other.state_dict() == of(norms).state_dict()

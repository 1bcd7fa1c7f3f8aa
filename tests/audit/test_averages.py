"""Running averages that stall, told from those that follow."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floatline.audit.averages import audit_average
from floatline.errors import ConfigError


def test_bf16_never_falls_under_999():
    report = audit_average((1.0, 0.5), 0.999, "bf16")
    assert (report.failure, report.stalled_at, report.movement.swallowed) == ("stagnation", 0, 1.0)
    assert "fp32" in report.advice and "0.999" in report.advice
    assert json.loads(json.dumps(report.as_dict()))["failure"] == "stagnation"


def test_bf16_rises_from_zero_and_stalls_on_the_way():
    report = audit_average((0.0, 1.0), 0.999, "bf16")
    assert report.failure == "stagnation" and 100 < report.stalled_at < 1000
    assert 0.2 < report.movement.progress < 0.3


@pytest.mark.parametrize(
    ("decay", "format"), [(0.9, "bf16"), (0.5, "bf16"), (0.9, "fp16"), (0.99, "fp16"), (0.999, "fp32")]
)
def test_averages_that_follow_ask_for_nothing(decay, format):
    report = audit_average((1.0, 0.5), decay, format)
    assert report.failure is None and report.advice == ""


def test_a_sequence_starts_at_its_first_value():
    values = [torch.full((8,), 1.0)] + [torch.full((8,), 0.25)] * 30
    report = audit_average(values, 0.9, "bf16")
    assert report.steps == 30 and report.failure is None
    assert audit_average(values, 0.999, "bf16").failure == "stagnation"


def test_an_average_that_has_nowhere_to_go_is_healthy():
    report = audit_average([torch.ones(4)] * 5, 0.999, "bf16")
    assert report.failure is None and report.movement.swallowed is None


def test_values_beyond_fp16_are_a_matter_of_range():
    report = audit_average((1.0, 1e6), 0.9, "fp16")
    assert report.failure == "range" and report.non_finite and "leave fp16" in report.advice


@settings(max_examples=10, deadline=None)
@given(st.floats(0.5, 2.0), st.floats(0.1, 0.9), st.sampled_from([0.9, 0.99, 0.999]))
def test_what_is_left_is_at_most_half_an_ulp_over_one_minus_decay(start, share, decay):
    report = audit_average((start, start * share), decay, "bf16", steps=1500)
    ulp = 2.0**-7 * 2  # of numbers below 2
    left = abs(1 - report.movement.progress) * abs(start * (1 - share)) if report.movement.progress is not None else 0
    assert left <= ulp / 2 / (1 - decay) + ulp


@pytest.mark.parametrize(
    ("values", "decay", "format", "text", "hint"),
    [
        ((0.0, 1.0), 1.0, "bf16", "decay=1.0 is not between 0 and 1", "momentum"),
        ((0.0, 1.0), 0.9, "bf61", "unknown format of an average 'bf61'", "bf16"),
        ([torch.ones(2)], 0.9, "bf16", "1 values make no average", "(start, target)"),
        ([torch.ones(2), torch.ones(3)], 0.9, "bf16", "shapes [(2,), (3,)]", "one shape"),
        ((0.0, float("nan")), 0.9, "bf16", "NaN or infinity already", "diagnose"),
    ],
)
def test_bad_input_is_told(values, decay, format, text, hint):
    with pytest.raises(ConfigError) as caught:
        audit_average(values, decay, format)
    assert text in caught.value.message and hint in caught.value.hint


def test_steps_must_be_a_count():
    with pytest.raises(ConfigError, match="steps=0"):
        audit_average((0.0, 1.0), 0.9, steps=0)

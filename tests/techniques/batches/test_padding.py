"""The padding report."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import floatline as fl
from floatline.errors import DataError
from floatline.techniques.batches.padding import padding_report


def test_by_hand():
    report = padding_report([2, 5, 3], [[0, 2], [1]], baseline=[[0, 1], [2]])
    assert (report.tokens, report.padded_tokens, report.baseline_padded_tokens) == (10, 11, 13)
    assert (report.padding, report.baseline_padding) == (1, 3)
    assert report.removed == pytest.approx(2 / 3)
    assert str(report) == ("padding 1 of 11 tokens (9.1%), unbucketed 3 of 13 (23.1%): 66.7% of the padding removed")


def test_nothing_to_remove():
    assert padding_report([4, 4], [[0, 1]]).removed == 0.0


@given(st.lists(st.integers(1, 50), min_size=2, max_size=40))
def test_sorted_batches_are_never_worse_than_random_ones_of_their_sizes(lengths):
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + 4] for start in range(len(order) % 4, len(order), 4)]
    batches = [order[: len(order) % 4], *batches] if len(order) % 4 else batches
    report = padding_report(lengths, batches)
    assert report.tokens == sum(lengths)
    assert report.tokens <= report.padded_tokens <= report.baseline_padded_tokens


def test_bad_input():
    with pytest.raises(DataError, match="lengths is None"):
        padding_report(None, [[0]])
    with pytest.raises(DataError, match="no batches, or an empty one"):
        padding_report([1], [[]])
    with pytest.raises(DataError, match="baseline holds other samples"):
        padding_report([1, 2], [[0]], baseline=[[1]])


def test_public():
    assert fl.techniques.padding_report is padding_report

"""The bucketed order: every sample once, from (seed, epoch) alone, and little padding on realistic lengths."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError, DataError
from floatline.techniques.batches.buckets import (
    bucketed_updates,
    check_budget,
    checked_lengths,
    cut_by_tokens,
    digest_of,
    split_to_multiple,
)
from floatline.techniques.batches.padding import padding_report

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


def instruction_lengths(count=20_000, seed=0):
    """Log-normal, mean about 200 tokens, cut at 2048: the shape of instruction data."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (4.9 + 0.9 * draws).exp().clamp(8, 2048).long().tolist()


@given(LENGTHS, st.integers(1, 7), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.booleans())
def test_every_sample_once_an_epoch(lengths, batch_size, window, epoch, shuffle, drop_last):
    updates = bucketed_updates(
        lengths, batch_size=batch_size, window=window, seed=1, epoch=epoch, shuffle=shuffle, drop_last=drop_last
    )
    drawn = [index for update in updates for index in update]
    tail = len(lengths) % batch_size
    assert len(drawn) == len(set(drawn)) == len(lengths) - tail * drop_last
    assert set(drawn) <= set(range(len(lengths)))
    assert all(len(update) == batch_size for update in updates[: len(lengths) // batch_size])


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = instruction_lengths(200)

    def order(seed, epoch):
        torch.manual_seed(torch.seed())  # the global random numbers are not looked at
        updates = bucketed_updates(lengths, batch_size=4, window=5, seed=seed, epoch=epoch)
        return tuple(map(tuple, updates))

    assert order(1, 0) == order(1, 0)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_a_window_of_one_leaves_the_samples_random():
    lengths = instruction_lengths(64)
    updates = bucketed_updates(lengths, batch_size=8, window=1, seed=3, epoch=0)
    again = bucketed_updates([1] * 64, batch_size=8, window=1, seed=3, epoch=0)
    assert updates == again
    sorted_together = bucketed_updates(lengths, batch_size=8, window=8, seed=3, epoch=0)
    spread = [max(lengths[i] for i in u) - min(lengths[i] for i in u) for u in sorted_together]
    assert sum(spread) < 0.4 * sum(max(lengths[i] for i in u) - min(lengths[i] for i in u) for u in updates)


@given(LENGTHS, st.integers(1, 200))
def test_the_budget_is_kept_and_nothing_is_lost(lengths, spare):
    budget = max(lengths) + spare
    groups = cut_by_tokens(range(len(lengths)), lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[index] for index in group) <= budget for group in groups)
    merged = [(len(one) + len(other)) * max(lengths[one[0]], lengths[other[0]]) for one, other in pairwise(groups)]
    assert all(size > budget for size in merged[:-1])  # no two neighbours but the last would fit together
    assert cut_by_tokens([], lengths, budget) == [] == cut_by_tokens([], lengths, None)


@given(LENGTHS, st.integers(1, 6))
def test_every_rank_gets_as_many(lengths, ranks):
    lengths = (lengths * ranks)[: len(lengths) - len(lengths) % ranks or ranks]
    groups = cut_by_tokens(range(len(lengths)), lengths, max(lengths))
    shared = split_to_multiple(groups, lengths, ranks)
    assert len(shared) % ranks == 0
    assert sorted(index for group in shared for index in group) == list(range(len(lengths)))
    assert all(len(group) * lengths[group[0]] <= max(lengths) for group in shared)
    assert len(shared) < len(groups) + ranks


def test_too_few_samples_for_the_ranks():
    with pytest.raises(DataError, match=r"3 samples cannot be shared out to 2 ranks\nhint: .*batch_size"):
        split_to_multiple([[0], [1], [2]], [5, 5, 5], 2)


def test_bucketing_removes_most_padding_of_instruction_data():
    lengths = instruction_lengths()
    assert 170 < sum(lengths) / len(lengths) < 230 and max(lengths) == 2048
    updates = bucketed_updates(lengths, batch_size=32, window=50, seed=0, epoch=0)
    report = padding_report(lengths, updates)
    assert report.baseline_padding > report.tokens  # random batches of 32 are mostly padding
    assert report.removed > 0.9
    small = padding_report(lengths, bucketed_updates(lengths, batch_size=8, window=50, seed=0, epoch=0))
    assert small.removed > 0.9


def test_sorting_inside_random_updates_removes_some_as_well():
    lengths = instruction_lengths()
    updates = bucketed_updates(lengths, batch_size=64, window=1, seed=0, epoch=0)
    batches = [group for update in updates for group in cut_by_tokens(update, lengths, 4096)]
    assert padding_report(lengths, batches).removed > 0.6


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (None, "needs the length of every sample, lengths is None"),
        (iter([1]), "list_iterator is a stream without lengths"),
        ([3, 0], "the length of sample 1 is 0"),
        ([3, 2.5], "the length of sample 1 is 2.5"),
        ([True], "the length of sample 0 is True"),
    ],
)
def test_lengths_that_are_none(lengths, message):
    with pytest.raises(DataError, match=message) as caught:
        checked_lengths(lengths)
    assert caught.value.hint


def test_lengths_come_in_any_shape():
    assert checked_lengths(torch.tensor([1, 2])) == checked_lengths((1, 2)) == [1, 2]
    with pytest.raises(DataError, match="2 lengths for 3 samples"):
        checked_lengths([1, 2], size=3)
    assert digest_of([1, 2]) != digest_of([12]) and digest_of([1, 2]) == digest_of((1, 2))


def test_a_budget_that_cannot_be():
    with pytest.raises(
        DataError, match=r"sample 1 has 9 tokens, more than max_tokens=8\nhint: set max_tokens=9 or more"
    ):
        check_budget([3, 9], 8)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        check_budget([3], 0)

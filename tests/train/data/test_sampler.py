from __future__ import annotations

from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import DataError
from floatline.train.data import EpochSampler
from floatline.train.data.sampler import UpdateSampler

SETTINGS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 30),
        "seed": st.integers(-(2**40), 2**40),
        "shuffle": st.booleans(),
        "batch_size": st.integers(1, 7),
        "drop_last": st.booleans(),
    }
)


def drawn(sampler: EpochSampler, epochs: int) -> list[list[int]]:
    return [list(sampler) for _ in range(epochs)]


@given(SETTINGS)
def test_every_epoch_is_a_permutation(settings):
    size = settings["size"]
    for order in drawn(EpochSampler(**settings), 3):
        kept = size - size % settings["batch_size"] if settings["drop_last"] else size
        assert len(order) == len(set(order)) == kept
        assert set(order) <= set(range(size))


@given(SETTINGS, st.integers(0, 100))
def test_resuming_anywhere_equals_not_stopping(settings, point):
    whole = drawn(EpochSampler(**settings), 3)
    epoch, position = divmod(point, len(whole[0]) + 1)
    if epoch > 1:
        epoch = 1
    sampler = EpochSampler(**settings)
    drawn(sampler, epoch)
    iterator = iter(sampler)
    list(islice(iterator, position))
    state = iterator.state_dict()

    later = EpochSampler(**settings)
    resumed = iter(later)
    resumed.load_state_dict(state)
    assert list(resumed) == whole[epoch][position:]
    assert list(later) == whole[epoch + 1]


def test_epochs_and_seeds_differ():
    orders = {tuple(EpochSampler(20, seed=seed).order(epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_without_shuffling_the_order_is_the_files():
    assert list(EpochSampler(4, shuffle=False)) == [0, 1, 2, 3]


def test_an_iterator_that_is_left_starts_its_epoch_again():
    sampler = EpochSampler(10, seed=3)
    list(islice(iter(sampler), 4))
    assert list(sampler) == EpochSampler(10, seed=3).order(0)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"size": 9}, "samples=10, now samples=9"), ({"seed": 2}, "train.seed=1, now"), ({"shuffle": False}, "shuffle=1")],
)
def test_a_position_in_other_data_is_refused(change, what):
    state = iter(EpochSampler(10, seed=1)).state_dict()
    other = EpochSampler(**{"size": 10, "seed": 1, **change})
    with pytest.raises(DataError, match=what) as caught:
        iter(other).load_state_dict(state)
    assert "new run directory" in caught.value.hint


BUCKETED = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=40),
        "batch_size": st.sampled_from([4, 8, 12]),
        "window": st.integers(1, 3),
        "seed": st.integers(0, 5),
    }
)


def bucketed(lengths, **settings):
    return EpochSampler(len(lengths), lengths=lengths, **settings)


@given(BUCKETED, st.booleans(), st.integers(0, 3))
def test_a_bucketed_epoch_is_a_permutation(settings, drop_last, epoch):
    sampler = bucketed(**settings, drop_last=drop_last)
    order = sampler.order(epoch)
    assert len(order) == len(set(order)) == len(sampler)
    assert set(order) <= set(range(sampler.size))


def test_a_window_of_one_is_the_order_without_lengths():
    for epoch in range(3):
        plain = EpochSampler(22, seed=4, batch_size=4, drop_last=True).order(epoch)
        assert bucketed(list(range(1, 23)), seed=4, batch_size=4, drop_last=True, window=1).order(epoch) == plain


@given(BUCKETED, st.sampled_from([None, 40, 90]), st.booleans())
def test_any_number_of_ranks_draws_the_same_updates(settings, max_tokens, known):
    if not known:
        settings = {**settings, "window": 1}
        max_tokens = None

    def updates(ranks):
        def order():
            if known:
                return bucketed(**settings, drop_last=True)
            rest = {key: value for key, value in settings.items() if key not in ("lengths", "window")}
            return EpochSampler(len(settings["lengths"]), **rest, drop_last=True)

        parts = [UpdateSampler(order(), max_tokens=max_tokens, rank=rank, ranks=ranks) for rank in range(ranks)]
        return list(zip(*map(list, parts), strict=True))

    alone = [sorted(_flat(update)) for (update,) in updates(1)]
    for ranks in (2, 4):
        shared = updates(ranks)
        assert [sorted(chain.from_iterable(map(_flat, parts))) for parts in shared] == alone
        for parts in shared:
            assert len({len(part) for part in parts}) == 1  # as many samples or micro-batches on each rank
            if max_tokens:
                groups = [group for part in parts for group in part]
                assert all(len(g) * max(settings["lengths"][i] for i in g) <= max_tokens for g in groups)


def _flat(update):
    return [index for part in update for index in (part if isinstance(part, tuple) else (part,))]


@given(BUCKETED, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 9))
def test_a_position_means_the_same_on_any_number_of_ranks(settings, before, after, done):
    def sampler(rank, ranks):
        return UpdateSampler(bucketed(**settings, drop_last=True), max_tokens=40, rank=rank, ranks=ranks)

    drawing = iter(sampler(0, before))
    list(islice(drawing, done))
    state = drawing.state_dict()
    resumed = iter(sampler(after - 1, after))
    resumed.load_state_dict(state)
    assert list(resumed) == list(sampler(after - 1, after))[done:]


def test_a_position_under_other_bucketing_is_refused():
    state = iter(bucketed([1, 2, 3, 4], batch_size=2, window=2)).state_dict()
    for other, now in (
        (EpochSampler(4, batch_size=2), "now off"),
        (bucketed([1, 2, 3, 4], batch_size=2, window=1), "now window 1 of 2"),
        (bucketed([1, 2, 3, 5], batch_size=2, window=2), "now window 2 of 2, lengths"),
    ):
        with pytest.raises(DataError, match=f"saved with length bucketing window 2 of 2, lengths .*, {now}"):
            iter(other).load_state_dict(state)
    plain = iter(EpochSampler(4, batch_size=2)).state_dict()
    with pytest.raises(DataError, match="saved with length bucketing off, now window 2 of 2"):
        iter(bucketed([1, 2, 3, 4], batch_size=2, window=2)).load_state_dict(plain)

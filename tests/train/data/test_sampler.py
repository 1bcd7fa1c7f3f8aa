from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import DataError
from floatline.train.data import EpochSampler

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

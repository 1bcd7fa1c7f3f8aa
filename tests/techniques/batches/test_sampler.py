"""TokenBudgetSampler: budget, epochs, ranks, resuming."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from floatline.errors import ConfigError, DataError
from floatline.techniques import TokenBudgetSampler

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=50)
SETTINGS = st.fixed_dictionaries(
    {"window": st.integers(1, 4), "seed": st.integers(-5, 5), "shuffle": st.booleans(), "drop_last": st.booleans()}
)


def sampler_of(lengths, spare=20, **settings):
    return TokenBudgetSampler(lengths, max_tokens=max(lengths) + spare, **settings)


def flat(batches):
    return [index for batch in batches for index in batch]


@given(LENGTHS, SETTINGS, st.integers(0, 60))
def test_every_sample_once_and_never_above_the_budget(lengths, settings, spare):
    sampler = sampler_of(lengths, spare, **settings)
    for epoch in range(3):
        assert sampler.epoch == epoch
        count = len(sampler)
        batches = list(sampler)
        assert len(batches) == count
        assert sorted(flat(batches)) == list(range(len(lengths)))
        assert all(len(b) * max(lengths[i] for i in b) <= sampler.max_tokens for b in batches)


@given(LENGTHS, SETTINGS, st.integers(2, 4))
def test_ranks_share_one_sequence(lengths, settings, ranks):
    alone = sampler_of(lengths, **settings)
    sequence = list(alone)
    parts = [list(sampler_of(lengths, rank=rank, ranks=ranks, **settings)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    together = [batch for step in zip(*parts, strict=True) for batch in step]
    whole = len(sequence) - len(sequence) % ranks
    assert together[:whole] == sequence[:whole]
    assert all(len(b) * max(lengths[i] for i in b) <= alone.max_tokens for b in together)
    if settings["drop_last"]:
        assert len(together) == whole
    elif len(flat(sequence[whole:])) >= ranks or whole == len(sequence):
        assert sorted(flat(together)) == list(range(len(lengths)))
    else:  # the last samples are fewer than the ranks: others are drawn twice, none is lost
        assert set(flat(together)) == set(range(len(lengths)))
        assert len(together) == whole + ranks


@given(LENGTHS, SETTINGS, st.integers(1, 3), st.integers(0, 99))
def test_resuming_anywhere_equals_not_stopping(lengths, settings, ranks, point):
    settings = {**settings, "ranks": ranks, "rank": ranks - 1}
    whole = sampler_of(lengths, **settings)
    epochs = [list(whole) for _ in range(3)]
    epoch, taken = divmod(point % max(2 * (len(epochs[0]) + 1), 1), len(epochs[0]) + 1)
    taken = min(taken, len(epochs[epoch]))
    stopped = sampler_of(lengths, **settings)
    for _ in range(epoch):
        list(stopped)
    iterator = iter(stopped)
    list(islice(iterator, taken))
    state = iterator.state_dict()
    assert state == stopped.state_at(epoch, taken * ranks)

    for resume in (lambda s: s.load_state_dict(state), None):
        later = sampler_of(lengths, **settings)
        if resume:
            resume(later)
            rest = list(later)
        else:
            drawing = iter(later)
            drawing.load_state_dict(state)
            rest = list(drawing)
        assert rest == epochs[epoch][taken:]
        assert list(later) == epochs[epoch + 1]


@given(LENGTHS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
def test_resuming_on_another_number_of_ranks_loses_nothing(lengths, before, after, taken):
    first = [iter(sampler_of(lengths, rank=rank, ranks=before)) for rank in range(before)]
    seen = [flat(islice(iterator, taken)) for iterator in first]
    states = [iterator.state_dict() for iterator in first]
    assert all(state == states[0] for state in states)
    for rank in range(after):
        sampler = sampler_of(lengths, rank=rank, ranks=after)
        sampler.load_state_dict(states[0])
        seen.append(flat(sampler))
    assert ({index for part in seen for index in part}) == set(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch():
    lengths = list(range(1, 60))
    orders = {str(list(islice(iter(_at(lengths, seed, epoch)), 99))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert list(_at(lengths, 1, 2)) == list(_at(lengths, 1, 2))


def _at(lengths, seed, epoch):
    sampler = sampler_of(lengths, seed=seed)
    sampler.set_epoch(epoch)
    return sampler


def test_an_iterator_that_is_left_starts_its_epoch_again():
    sampler = sampler_of([3] * 30, spare=3)
    list(islice(iter(sampler), 4))
    assert sampler.epoch == 0 and list(sampler) == sampler.batches(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [1, 2, 4]}, "lengths="),
        ({"lengths": [1, 2]}, "samples=3, now samples=2"),
        ({"seed": 2}, "seed=0, now seed=2"),
        ({"max_tokens": 9}, "max_tokens=8, now max_tokens=9"),
        ({"window": 3}, "window=50, now window=3"),
        ({"shuffle": False}, "shuffle=True, now shuffle=False"),
    ],
)
def test_a_position_of_something_else_is_refused(change, message):
    state = TokenBudgetSampler([1, 2, 3], max_tokens=8).state_dict()
    other = TokenBudgetSampler(**{"lengths": [1, 2, 3], "max_tokens": 8, **change})
    with pytest.raises(DataError, match=message) as caught:
        other.load_state_dict(state)
    assert "start anew" in caught.value.hint
    with pytest.raises(DataError, match="not one of a TokenBudgetSampler"):
        other.load_state_dict({"epoch": 1, "drawn": 0})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (None, "lengths is None"),
        (Stream(), "Stream is a stream without lengths"),
        ([5, 9, 2], "sample 1 has 9 tokens, more than max_tokens=8"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(DataError, match=message) as caught:
        TokenBudgetSampler(lengths, max_tokens=8)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"window": 0}, "window is 0"),
        ({"rank": 2, "ranks": 2}, "rank=2 of ranks=2"),
        ({"ranks": 0}, "ranks=0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TokenBudgetSampler([1, 2], **{"max_tokens": 4, **settings})


@pytest.mark.parametrize("workers", [0, 2])
def test_in_the_loaders_of_others(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    lengths = [1 + at % 7 for at in range(40)]
    data = [torch.zeros(length) for length in lengths]
    plain = DataLoader(data, batch_sampler=sampler_of(lengths), collate_fn=lambda rows: [len(row) for row in rows])
    assert sorted(flat(plain)) == sorted(lengths)

    def loader():
        return StatefulDataLoader(
            list(range(40)),
            batch_sampler=sampler_of(lengths),
            collate_fn=list,
            num_workers=workers,
            multiprocessing_context="forkserver" if workers else None,
        )

    whole = list(loader())
    stopped = loader()
    first = list(islice(iter(stopped), 3))
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert first + list(resumed) == whole

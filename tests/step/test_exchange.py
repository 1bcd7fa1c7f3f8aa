"""What ranks agree on before an update: equally many micro-batches, weights that sum up to all data, the same kinds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError
from floatline.step.exchange import _kind, share_out, with_some_target
from floatline.techniques import OneRank


class Scripted(OneRank):
    """Rank 0 of several; how many micro-batches and targets the others have is given, their kinds are rank 0's."""

    def __init__(self, *others):
        self.size = 1 + len(others)
        self.others = list(others)
        self.calls = 0

    def tell(self, numbers):
        self.calls += 1
        mine = [float(number) for number in numbers]
        others = [[*map(float, other), mine[-1]] for other in self.others]
        return [mine, *(others if self.calls == 1 else [mine] * len(others))]


def batches(number):
    return [{"input_ids": torch.tensor([[n]]), "labels": torch.tensor([[n]])} for n in range(number)]


def test_weights_count_targets_of_all_ranks():
    pairs = share_out(batches(2), [3, 1], Scripted((2, 12)))
    assert [weight for _, weight in pairs] == [3 * 2 / 16, 1 * 2 / 16]


@given(
    mine=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    others=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 99)), min_size=1, max_size=3),
)
def test_every_rank_runs_equally_many_and_weights_are_its_share(mine, others):
    ranks = Scripted(*others)
    pairs = share_out(batches(len(mine)), mine, ranks)
    total = sum(mine) + sum(targets for _, targets in others)
    if total == 0:
        assert [weight for _, weight in pairs] == [None]
        return
    assert len(pairs) == max(len(mine), *(number for number, _ in others))
    assert sum(weight for _, weight in pairs) == pytest.approx(sum(mine) * ranks.size / total)
    assert all(weight or not batch["labels"].any() for batch, weight in pairs)


def test_a_batch_without_targets_gets_some():
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.full((2, 3), -100)}
    assert with_some_target(batch)["labels"].tolist() == [[0, 0, 0]] * 2
    assert (batch["labels"] == -100).all()
    soft = {"x": torch.ones(2), "labels": torch.ones(2)}
    assert with_some_target(soft) is soft


def test_what_makes_micro_batches_alike():
    ids = torch.ones(2, 3)
    plain = _kind({"input_ids": ids, "pixel_values": None})
    assert plain == _kind({"input_ids": ids, "position_ids": ids}) == ["input_ids"]
    assert plain != _kind({"input_ids": ids, "pixel_values": ids})


def test_bad_input():
    with pytest.raises(ConfigError, match="at least one micro-batch on every rank, one has none\nhint: share out"):
        share_out(batches(1), [1], Scripted((0, 0)))

    class OtherKind(Scripted):
        def tell(self, numbers):
            *others, last = super().tell(numbers)
            return [*others, [*last[:-1], 1.0]]

    message = r"different kinds, on this rank: \[\['input_ids', 'labels'\]\].*\nhint: give"
    for other in ((1, 1), (2, 1)):  # told at once, and where this rank repeats a micro-batch
        expected = message if other[0] == 1 else message.replace(r"\]\]", r"\], \['input_ids', 'labels'\]\]")
        with pytest.raises(ConfigError, match=expected):
            share_out(batches(1), [1], OtherKind(other))


def test_one_message_an_update_where_ranks_have_equally_many():
    ranks = Scripted((2, 12))
    share_out(batches(2), [3, 1], ranks)
    assert ranks.calls == 1
    ranks = Scripted((3, 12))
    share_out(batches(2), [3, 1], ranks)
    assert ranks.calls == 2

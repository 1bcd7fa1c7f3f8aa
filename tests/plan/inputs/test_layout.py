"""What all batches share."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.plan.inputs.layout import class_ids, masked_labels, noise, token_ids


@given(st.integers(1, 4), st.integers(1, 40), st.integers(2, 60), st.frozensets(st.integers(0, 99), max_size=5))
def test_ids_are_in_the_vocabulary_and_not_special(batch, length, vocabulary, special):
    ids = token_ids(batch, length, vocabulary, special)
    assert ids.shape == (batch, length) and ids.dtype is torch.int64
    assert ids.min() >= 0 and ids.max() < vocabulary
    if set(range(vocabulary)) - special:
        plain = min(set(range(vocabulary)) - special)
        assert plain >= vocabulary or not set(ids.flatten().tolist()) & special


def test_the_same_ids_come_every_time():
    assert torch.equal(token_ids(2, 8, 50), token_ids(2, 8, 50))


def test_masked_labels_keep_a_share_and_at_least_one_a_row():
    ids = token_ids(50, 400, 90)
    labels = masked_labels(ids)
    kept = labels != -100
    assert torch.equal(labels[kept], ids[kept])
    assert 0.13 < kept.float().mean() < 0.17
    assert (masked_labels(ids[:, :1]) != -100).all()


def test_classes_come_in_turn():
    assert class_ids(5, 3).tolist() == [0, 1, 2, 0, 1]


def test_noise_has_a_storage_as_large_as_it_looks():
    made = noise(3, 4, 5)
    assert made.is_contiguous() and made.untyped_storage().nbytes() == 3 * 4 * 5 * 4
    assert torch.equal(made[0], made[2]) and made.std() > 0.5

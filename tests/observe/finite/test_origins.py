"""The ledger: which storage holds values of which origins."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.observe.finite.origins import Kind, Ledger, Origin, Spot


def origin(number=1):
    spot = Spot(op="log", module="", user=None, library=None)
    return Origin(number=number, kind=Kind.FAULT, phase="forward", spot=spot, ran="log")


def test_views_share_what_their_storage_has():
    ledger, tensor, one = Ledger(), torch.zeros(4, 4), origin()
    ledger.add(tensor, {one})
    assert ledger.of(tensor[1]) == ledger.of(tensor.T) == {one}
    assert ledger.of(torch.zeros(2)) == frozenset()


def test_overwriting_all_of_a_storage_forgets_and_a_part_does_not():
    ledger, tensor, one, two = Ledger(), torch.zeros(4), origin(1), origin(2)
    ledger.add(tensor, {one})
    ledger.clear(tensor[:2])
    assert ledger.of(tensor) == {one}
    ledger.add(tensor[:2], {two})
    assert ledger.of(tensor) == {one, two}
    ledger.add(tensor, {two})
    assert ledger.of(tensor) == {two}
    ledger.clear(tensor)
    assert ledger.of(tensor) == frozenset()


def test_a_freed_storage_leaves_nothing_to_the_next_at_its_address():
    ledger = Ledger()
    for _ in range(50):
        tensor = torch.zeros(1024)
        assert ledger.of(tensor) == frozenset()
        ledger.add(tensor, {origin()})
        del tensor
    assert not ledger._of


def test_other_layouts_are_not_followed():
    ledger, sparse = Ledger(), torch.sparse_coo_tensor([[0]], [1.0], (2,))
    ledger.add(sparse, {origin()})
    ledger.clear(sparse)
    assert ledger.of(sparse) == frozenset()


@given(st.lists(st.tuples(st.sampled_from(["add", "clear"]), st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_what_a_storage_has_is_what_was_added_since_it_was_last_overwritten(steps):
    ledger, tensor = Ledger(), torch.zeros(4)
    origins = [origin(number) for number in range(4)]
    expected: set[Origin] = set()
    for action, part, number in steps:
        piece = tensor[part:]
        whole = part == 0
        if action == "add":
            ledger.add(piece, {origins[number]})
            expected = {origins[number]} if whole else expected | {origins[number]}
        else:
            ledger.clear(piece)
            expected = set() if whole else expected
        assert ledger.of(tensor) == expected

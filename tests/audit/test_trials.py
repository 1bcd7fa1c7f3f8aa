"""The account of trials: which sets are one, what follows from a failure, which trial is best."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.audit.trials import Item, Outcome, Spent, Trials, covers, inside, merged

ITEMS = [
    Item(name=name, cost=cost, suspicion=0.0) for name, cost in {"a": 5.0, "a.x": 1.0, "a.y": 2.0, "b": 4.0}.items()
]

dotted = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(".".join)
sets = st.frozensets(dotted, max_size=6)


def trials(evaluate=lambda islands: Outcome(passes="b" in islands, error=1.0), most=None, enough=100):
    return Trials(ITEMS, evaluate, most, enough)


@given(sets, dotted)
def test_merged_islands_cover_the_same_modules(names, name):
    islands = merged(names)
    assert inside(name, islands) == inside(name, names)
    assert merged(islands) == islands and not any(inside(one, islands, strictly=True) for one in islands)


@given(sets, sets, dotted)
def test_what_covers_a_set_covers_all_that_it_covers(outer, inner, name):
    assert covers(outer | inner, inner) and covers(merged(outer), outer)
    assert not (covers(outer, inner) and inside(name, inner)) or inside(name, outer)


def test_a_set_is_tried_once_and_costs_what_is_not_inside_another():
    asked = []
    account = trials(lambda islands: asked.append(islands) or Outcome(passes=True, error=0.5))
    assert account.try_out(["a", "a.x"]) is account.try_out(["a"]) and asked == [{"a"}]
    assert account.cost(["a", "a.x"]) == 5.0 and account.cost(["a.x", "a.y", "b"]) == 7.0


def test_failures_are_inferred_until_a_trial_contradicts_that():
    account = trials(lambda islands: Outcome(passes=islands in ({"a.x"}, {"b"}), error=1.0))
    assert not account.passes(["a"])
    assert not account.passes(["a.x"]) and len(account.made) == 1 and account.monotone
    assert account.passes(["b"]) and account.monotone
    assert account.try_out(["a.x"]).outcome.passes and not account.monotone
    assert not account.passes(["a.y"]) and len(account.made) == 4


def test_a_smaller_set_that_passed_before_is_a_contradiction_too():
    account = trials(lambda islands: Outcome(passes=len(islands) < 2, error=1.0))
    assert account.passes(["b"]) and not account.passes(["a.x", "b"]) and not account.monotone


def test_limits():
    account = trials(most=2, enough=1)
    account.try_out([])
    with account.refining():
        account.try_out([])  # made before
        assert not account.unrefined
    with account.refining():
        account.try_out(["a"])
        pytest.fail("one more than enough")
    assert account.unrefined and len(account.made) == 1
    account.try_out(["a"])
    with pytest.raises(Spent):
        account.try_out(["b"])
    assert len(account.made) == 2


def test_the_best_is_the_cheapest_then_that_with_the_fewest_islands():
    account = trials(lambda islands: Outcome(passes=True, error=1.0))
    assert account.best() is None
    for names in (["a", "b"], ["a.x", "b"], ["a"]):
        account.try_out(names)
    assert account.best().islands == {"a"}

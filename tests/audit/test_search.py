"""The search for islands, against oracles whose answer is known: culprits, alternatives, sums, errors that cancel."""

import random
from itertools import combinations
from math import inf, log2, nan

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from floatline.audit.search import Found, Item, Outcome, enough_trials, search
from floatline.audit.trials import covers, inside, merged
from floatline.errors import ConfigError


def flat(count, cost=lambda i: 1.0):
    """Items m0, m1, ... by falling suspicion."""
    return [Item(name=f"m{i}", cost=cost(i), suspicion=-i) for i in range(count)]


def needs(*sets):
    """An oracle that passes where one of the sets is covered; the error counts what is missing of the nearest."""
    wanted = [frozenset(names) for names in sets]

    def evaluate(islands):
        missing = min(sum(not inside(name, islands) for name in names) for names in wanted)
        return Outcome(passes=missing == 0, error=0.5 + missing)

    return evaluate


class Once:
    """Lets an oracle be asked for each set once, and only for sets of which no module is inside another."""

    def __init__(self, evaluate):
        self.evaluate, self.asked = evaluate, []

    def __call__(self, islands):
        assert islands not in self.asked and merged(islands) == islands
        self.asked.append(islands)
        return self.evaluate(islands)


def checked(items, evaluate, **limits) -> Found:
    """Search, and check what holds of every search."""
    oracle = Once(evaluate)
    found = search(items, oracle, **limits)
    costs = {item.name: item.cost for item in items}
    assert [trial.islands for trial in found.trials] == oracle.asked
    assert all(trial.outcome == evaluate(trial.islands) for trial in found.trials)
    assert all(trial.cost == pytest.approx(sum(costs[name] for name in trial.islands)) for trial in found.trials)
    passed = [trial for trial in found.trials if trial.outcome.passes]
    assert (found.islands is None) == (not passed)
    if passed:
        assert found.islands == min(passed, key=lambda trial: trial.order).islands
    assert search(items[::-1], evaluate, **limits) == found
    return found


def test_nothing_is_needed():
    found = checked(flat(50), needs(()))
    assert found.islands == frozenset() and len(found.trials) == 1 and not found.cut_short
    assert found.reason == "nothing is needed: without islands the error is 0.5 times the tolerance"


def test_no_candidates():
    assert checked([], needs(())).islands == frozenset()
    found = checked([], needs(("elsewhere",)))
    assert found.islands is None and len(found.trials) == 1


def test_the_fault_lies_elsewhere():
    found = checked(flat(100), needs(("elsewhere",)))
    assert found.islands is None and len(found.trials) <= 6 and not found.cut_short
    assert found.reason.startswith("not even all 100 candidates in fp32 help (without: 1.5 times the tolerance)")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 64, 100, 333, 1000])
def test_one_culprit_of_any_rank(count):
    for rank in range(0, count, max(1, count // 40)):
        found = search(flat(count), needs({f"m{rank}"}))
        assert found.islands == {f"m{rank}"} and not found.cut_short
        assert len(found.trials) <= 2 * log2(count) + 10


@pytest.mark.parametrize("count", [2, 3, 5, 11, 12, 17, 22, 33, 128])
@pytest.mark.parametrize("culprits", [2, 3])
def test_culprits_among_the_first_dozen(count, culprits):
    worst = 0
    for ranks in combinations(range(min(count, 12)), culprits):
        wanted = {f"m{rank}" for rank in ranks}
        found = search(flat(count, cost=lambda i: 1.0 + i % 3), needs(wanted))
        assert found.islands == wanted
        worst = max(worst, len(found.trials))
    assert worst <= 2 * log2(count) + 10


def test_a_good_suspicion_makes_it_short():
    assert len(search(flat(1000), needs({"m0"})).trials) <= 6
    assert enough_trials(1000) == 29 and enough_trials(1) == enough_trials(0) == 10


def test_many_small_errors_that_add_up():
    """The 40 worst of 200 are needed: a trial for each, not a bisection for each."""

    def evaluate(islands):
        error = sum(i < 40 for i in range(200) if f"m{i}" not in islands)
        return Outcome(passes=error == 0, error=float(error))

    found = checked(flat(200), evaluate)
    assert found.islands == {f"m{i}" for i in range(40)}
    assert len(found.trials) <= 2 * (40 + 30)  # half of them to refine it


NESTED = [
    *(Item(name=f"l.{i}", cost=4.0, suspicion=10 - i) for i in range(8)),
    *(Item(name=f"l.{i}.{part}", cost=1.0, suspicion=-i) for i in range(8) for part in ("norm", "attn", "mlp")),
    *(Item(name=f"l.{i}.attn.{part}", cost=0.25, suspicion=-9 - i) for i in range(8) for part in ("q", "k")),
]


def test_a_module_takes_the_place_of_the_one_around_it():
    assert checked(NESTED, needs({"l.3.norm"})).islands == {"l.3.norm"}
    found = checked(NESTED, needs({"l.3.attn.k"}))
    assert found.islands == {"l.3.attn.k"} and len(found.trials) <= 2 * log2(len(NESTED)) + 10
    assert checked(NESTED, needs({"l.3.attn.k", "l.5.mlp"})).islands == {"l.3.attn.k", "l.5.mlp"}


def test_all_islands_are_split_at_once_where_suspicions_are_good():
    layers = [Item(name=f"l.{i}", cost=4.0, suspicion=99 - i) for i in range(24)]
    parts = [Item(name=f"l.{i}.{part}", cost=1.0, suspicion=part) for i in range(24) for part in range(4)]
    for culprits in combinations(range(12), 3):
        wanted = {f"l.{i}.3" for i in culprits}
        found = search(layers + parts, needs(wanted))
        assert found.islands == wanted and len(found.trials) <= 2 * log2(24 * 5) + 10


def test_what_a_module_does_itself_needs_the_whole_module():
    assert checked(NESTED, needs({"l.3"})).islands == {"l.3"}
    assert checked(NESTED, needs({"l.3", "l.3.norm"})).islands == {"l.3"}


def test_all_of_what_is_inside_is_dearer_than_the_module():
    items = [Item(name="a", cost=2.0, suspicion=1), *(Item(name=f"a.{i}", cost=1.5, suspicion=0) for i in range(2))]
    assert checked(items, needs({"a.0", "a.1"})).islands == {"a"}
    assert checked(items, needs({"a.1"})).islands == {"a.1"}


def test_the_cheaper_of_two_that_both_help():
    items = flat(60, cost=lambda i: 100.0 if i == 0 else 1.0 + i)
    assert checked(items, needs({"m0"}, {"m30"}, {"m41"})).islands == {"m30"}
    assert checked(items[:16], needs({"m0"}, {"m3", "m6"})).islands == {"m3", "m6"}
    assert checked(items, needs({"m0"}, {"m50", "m59", "m58"})).islands == {"m0"}  # they cost more


def test_an_exchange_that_gets_too_dear_is_given_up():
    items = flat(12, cost=lambda i: 6.0 if i else 10.0)
    found = checked(items, needs({"m0"}, {"m4", "m7", "m9"}))
    tried = {trial.islands for trial in found.trials}
    assert found.islands == {"m0"} and not found.reason.endswith("trials")
    assert {f"m{i}" for i in range(1, 12)} in tried and {"m9"} in tried and {"m7", "m9"} not in tried


def test_cheaper_first_where_suspicions_are_equal():
    items = [Item(name=f"m{i}", cost=abs(i - 5) + 1.0, suspicion=1.0) for i in range(20)]
    found = search(items, needs(*({item.name} for item in items)))
    assert found.islands == {"m5"} and found.trials[2].islands == {"m4", "m5"}


def test_fewer_islands_of_the_same_cost():
    items = [Item(name=name, cost=2.0 if name == "a" else 1.0, suspicion=len(name)) for name in ("a", "a.0", "a.1")]
    assert checked(items, needs({"a.0", "a.1"})).islands == {"a"}
    assert checked(items, needs({"a.1"})).islands == {"a.1"}


def test_a_pair_that_works_only_together():
    found = checked(flat(100), needs({"m2", "m77"}))
    assert found.islands == {"m2", "m77"} and found.trials[0].outcome.error == 2.5


def test_errors_that_cancel():
    """All islands are worse than some: the result still is one that passed, and the reason says so."""

    def evaluate(islands):
        error = abs(5 * ("m1" not in islands) - 3 * ("m40" not in islands))
        return Outcome(passes=error <= 2, error=float(error))

    assert checked(flat(64), evaluate).islands == frozenset()
    found = checked(flat(64), lambda islands: Outcome(passes=islands == {"m0", "m1"}, error=1.0))
    assert found.islands == {"m0", "m1"} and "errors cancel" in found.reason
    odd = checked(flat(9), lambda islands: Outcome(passes=len(islands) % 2 == 1, error=1.0))
    assert len(odd.islands) == 1


def test_what_a_failed_trial_says_is_doubted():
    """{m0, m1} fails, yet m0 alone passes: found because islands are left out for real where trials are left."""
    passing = [{"m0"}, {"m0", "m2"}, {"m0", "m1", "m2"}, {"m0", "m1", "m2", "m3"}]
    found = checked(flat(4), lambda islands: Outcome(passes=islands in passing, error=1.0))
    assert found.islands == {"m0"} and "errors cancel" in found.reason


def test_refinement_ends():
    """Each of 12 layers has one needed module: more to split than trials allow, and the reason says so."""
    layers = [Item(name=f"l.{i}", cost=4.0, suspicion=9.0) for i in range(12)]
    parts = [Item(name=f"l.{i}.{part}", cost=1.0, suspicion=part) for i in range(12) for part in range(4)]
    found = checked(layers + parts, needs({f"l.{i}.{i % 4}" for i in range(12)}))
    assert not found.cut_short and "; refinement ended after" in found.reason
    assert any(name.count(".") == 2 for name in found.islands)


def test_the_bound_on_trials():
    wanted = {"m3", "m50", "m90"}
    free = checked(flat(100), needs(wanted))
    for most in range(2, len(free.trials) + 1):
        found = checked(flat(100), needs(wanted), most_trials=most)
        assert len(found.trials) <= most and wanted <= found.islands
        assert found.cut_short == (most < len(free.trials))
        assert found.trials == free.trials[: len(found.trials)]
        assert f"stopped after {most} trials" in found.reason or not found.cut_short
    assert checked(flat(100), needs(wanted), most_trials=2).islands == {f"m{i}" for i in range(100)}


def test_the_front():
    def evaluate(islands):
        error = (inf if "m0" not in islands else 3.0) - 2.5 * ("m1" in islands)
        return Outcome(passes=error <= 1, error=error)

    found = checked(flat(30), evaluate)
    assert [(sorted(trial.islands), trial.outcome.error) for trial in found.front] == [
        ([], inf),
        (["m0"], 3.0),
        (["m0", "m1"], 0.5),
    ]
    assert (
        found.reason == "2 of 30 candidates in fp32 (cost 2 of 30) bring the error from inf times the tolerance to 0.5"
    )


names = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), min_size=1, max_size=6, unique=True
)


@st.composite
def candidates(draw):
    """Items with names inside one another; what is inside costs less than what is around it."""
    chosen = draw(names)
    own = {name: draw(st.integers(0, 5)) for name in chosen}
    cost = {name: sum(own[other] for other in chosen if inside(other, frozenset({name}))) for name in chosen}
    return [Item(name=name, cost=cost[name], suspicion=draw(st.integers(0, 3))) for name in chosen]


def all_sets(items):
    chosen = [item.name for item in items]
    return {merged(some) for size in range(len(chosen) + 1) for some in combinations(chosen, size)}


def cost_of(items, islands):
    return sum(item.cost for item in items if item.name in islands)


@settings(max_examples=300, deadline=None)
@given(candidates(), st.data())
def test_needed_modules_are_found_at_the_least_cost(items, data):
    wanted = data.draw(st.sets(st.sampled_from([item.name for item in items])))
    found = checked(items, needs(wanted))
    assert cost_of(items, found.islands) == cost_of(items, merged(wanted))


@settings(max_examples=300, deadline=None)
@given(candidates(), st.data())
def test_nothing_can_be_left_out(items, data):
    """Any monotone oracle is a choice of alternatives, each of which needs some modules together."""
    some = st.frozensets(st.sampled_from([item.name for item in items]), max_size=4)
    wanted = data.draw(st.lists(some, min_size=1, max_size=4))
    evaluate = needs(*wanted)
    found = checked(items, evaluate)
    assert evaluate(found.islands).passes
    assert not any(evaluate(found.islands - {name}).passes for name in found.islands)
    assert "cancel" not in found.reason and not found.cut_short


@settings(max_examples=300, deadline=None)
@given(candidates(), st.data())
def test_any_oracle(items, data):
    """Outcomes at random: what is found has passed, and once they contradict each other nothing can be left out."""
    sets = sorted(all_sets(items), key=sorted)
    passing = data.draw(st.frozensets(st.sampled_from(sets)))
    limit = data.draw(st.none() | st.integers(2, 12))
    found = checked(items, lambda islands: Outcome(passes=islands in passing, error=1.0), most_trials=limit)
    everything = merged(item.name for item in items)
    assert found.islands in passing or not passing & {everything, frozenset()}
    assert limit is None or len(found.trials) <= limit
    if limit is None and found.islands and "cancel" in found.reason:
        assert not any(found.islands - {name} in passing for name in found.islands)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_can_be_left_out_when_there_are_no_trials_for_refinement(seed):
    """Alternatives of up to nine modules each among 20: more than 2 log2(N) + 10 trials."""
    rng = random.Random(seed)
    items = [Item(name=f"m{i}", cost=rng.randint(1, 9), suspicion=rng.random()) for i in range(20)]
    evaluate = needs(*(rng.sample([item.name for item in items], rng.randint(1, 9)) for _ in range(6)))
    found = checked(items, evaluate)
    assert not any(evaluate(found.islands - {name}).passes for name in found.islands)


@pytest.mark.parametrize("seed", range(60))
def test_outcomes_at_random_among_many(seed):
    """The same for outcomes that depend on nothing, once that has shown."""

    def evaluate(islands):
        passes = len(islands) == 14 or (len(islands) > 0 and random.Random(f"{seed}{sorted(islands)}").random() < 0.4)
        return Outcome(passes=passes, error=1.0)

    found = checked(flat(14), evaluate)
    if "cancel" in found.reason:
        assert not any(evaluate(found.islands - {name}).passes for name in found.islands)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.data())
def test_few_culprits_of_any_rank_are_all_found(count, data):
    wanted = data.draw(st.sets(st.integers(0, count - 1).map("m{}".format), max_size=5))
    found = checked(flat(count, cost=lambda i: 1.0 + i % 7), needs(wanted))
    assert found.islands == wanted
    assert len(found.trials) <= 2 + (len(wanted) + 1) * (2 * log2(count) + 10)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9)), min_size=1, max_size=25), st.integers(0, 150))
def test_errors_that_add_up(errors, tolerance):
    assume(sum(error for error, _ in errors) > tolerance)
    items = [Item(name=f"m{i}", cost=cost, suspicion=error) for i, (error, cost) in enumerate(errors)]

    def evaluate(islands):
        error = sum(error for i, (error, _) in enumerate(errors) if f"m{i}" not in islands)
        return Outcome(passes=error <= tolerance, error=error / (tolerance + 1))

    found = checked(items, evaluate)
    assert not any(evaluate(found.islands - {name}).passes for name in found.islands)


def test_how_often_it_is_the_cheapest_of_all():
    """Alternatives that need up to three modules each, against brute force (the seeds are fixed)."""
    cheapest = 0
    for seed in range(200):
        rng = random.Random(seed)
        items = [Item(name=f"m{i}", cost=rng.choice([1, 2, 3, 5, 8]), suspicion=rng.random()) for i in range(6)]
        wanted = [frozenset(f"m{i}" for i in rng.sample(range(6), rng.choice([1, 2, 3]))) for _ in range(3)]
        found = search(items, needs(*wanted))
        least = min(cost_of(items, some) for some in all_sets(items) if any(covers(some, names) for names in wanted))
        cheapest += cost_of(items, found.islands) == least
    assert cheapest >= 180


@pytest.mark.parametrize("most", [1, 0, -3])
def test_too_few_trials_allowed(most):
    with pytest.raises(ConfigError, match=f"most_trials is {most}\nhint: at least 2"):
        search(flat(3), needs(()), most_trials=most)


def test_bad_items():
    with pytest.raises(ConfigError, match="candidate islands given twice: m1\nhint: give each module once"):
        search([*flat(3), *flat(2)[1:]], needs(()))
    for cost in (-1.0, nan, inf):
        with pytest.raises(ConfigError, match=f"cost of a.b is {cost}\nhint: a cost is finite"):
            Item(name="a.b", cost=cost, suspicion=0.0)
    with pytest.raises(ConfigError, match="suspicion of a is NaN"):
        Item(name="a", cost=1.0, suspicion=nan)
    for name in ("", "a..b", ".a"):
        with pytest.raises(ConfigError, match=r"bad module name .* of a candidate island\nhint: use dotted names"):
            Item(name=name, cost=1.0, suspicion=0.0)
    for error in (-0.5, nan):
        with pytest.raises(ConfigError, match=f"error of a trial is {error}\nhint: at least 0"):
            Outcome(passes=False, error=error)


def test_an_error_of_the_oracle_is_the_callers():
    def evaluate(islands):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        search(flat(3), evaluate)

"""The account of a search for fp32 islands: which sets were tried, what came out, and what follows from it.

A trial runs the real step with these islands, so it is dear and no set is tried twice. An island on a module covers all
modules inside it: `{"a", "a.x"}` and `{"a"}` are one set, written `{"a"}`.

What follows from a failed trial: sets that it covers fail too, for fewer modules are in fp32. That is an assumption.
Errors can cancel, so that an island more makes the result worse; once a trial has shown that, nothing is inferred from
then on (`monotone` is False). Only failures are ever inferred; what passes has passed in a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import fsum, isfinite, isnan

from floatline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Item:
    """A module that may become an fp32 island.

    Attributes:
        name: Dotted name from the model's root.
        cost: What fp32 costs there, at least 0: a share of FLOPs, bytes, seconds. Costs of a set are added up.
        suspicion: The higher, the likelier it is needed; only the order counts.

    Raises:
        ConfigError: A name with an empty component, a cost that is negative or not finite, a suspicion that is NaN.
    """

    name: str
    cost: float
    suspicion: float

    def __post_init__(self) -> None:
        if not all(self.name.split(".")):
            raise ConfigError(
                f"bad module name {self.name!r} of a candidate island",
                hint="use dotted names from model.named_modules(); the model itself (the empty name) is no island",
            )
        if not (isfinite(self.cost) and self.cost >= 0):
            raise ConfigError(f"cost of {self.name} is {self.cost}", hint="a cost is finite and at least 0")
        if isnan(self.suspicion):
            raise ConfigError(f"suspicion of {self.name} is NaN", hint="give the unknown 0 and the certain infinity")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a trial came to.

    Attributes:
        passes: Within the tolerance.
        error: The worst error relative to the tolerance, at least 0; infinite where a result is not finite.

    Raises:
        ConfigError: An error that is negative or NaN.
    """

    passes: bool
    error: float

    def __post_init__(self) -> None:
        if not self.error >= 0:
            raise ConfigError(f"error of a trial is {self.error}", hint="at least 0; infinity where it is not finite")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A set of islands, what came out, and the sum of the islands' costs."""

    islands: frozenset[str]
    outcome: Outcome
    cost: float

    @property
    def order(self) -> tuple[float, int, list[str]]:
        """By cost, then by number of islands, then by name."""
        return self.cost, len(self.islands), sorted(self.islands)


class Spent(Exception):
    """The most trials have been made and one more is asked for."""


class Enough(Exception):
    """As many trials as refinement may use have been made, and one more is asked for."""


def inside(name: str, islands: Container[str], *, strictly: bool = False) -> bool:
    """Say whether an island covers the module `name`: is the module itself (unless `strictly`) or one around it.

    >>> inside("a.x", frozenset({"a"})), inside("ab", frozenset({"a"})), inside("a", frozenset({"a"}), strictly=True)
    (True, False, False)
    """
    around = name.rpartition(".")[0] if strictly else name
    while around:
        if around in islands:
            return True
        around = around.rpartition(".")[0]
    return False


def merged(names: Iterable[str]) -> frozenset[str]:
    """Return the islands without those that lie inside another.

    >>> sorted(merged(["a.x", "b.y.z", "a", "b.y.w"]))
    ['a', 'b.y.w', 'b.y.z']
    """
    islands = frozenset(names)
    return frozenset(name for name in islands if not inside(name, islands, strictly=True))


def covers(outer: frozenset[str], inner: frozenset[str]) -> bool:
    """Say whether all that is fp32 with the islands `inner` is fp32 with `outer` too."""
    return all(inside(name, outer) for name in inner)


class Trials:
    """Asks for outcomes and keeps them.

    Args:
        items: The candidates.
        evaluate: Islands (none inside another) -> outcome.
        most: Trials that may be made; None for any number.
        enough: Trials after which refinement ends; may be raised on the way.
    """

    def __init__(
        self,
        items: Sequence[Item],
        evaluate: Callable[[frozenset[str]], Outcome],
        most: int | None,
        enough: int,
    ) -> None:
        self.costs = {item.name: item.cost for item in items}
        self.made: dict[frozenset[str], Trial] = {}
        self.monotone, self.unrefined, self.enough = True, False, enough
        self._evaluate, self._most = evaluate, most
        self._refining = False

    def cost(self, islands: Iterable[str]) -> float:
        """Return the cost of a set, what is covered not counted."""
        return fsum(self.costs[name] for name in sorted(merged(islands)))

    def passes(self, names: Iterable[str]) -> bool:
        """Say whether a set passes: by a trial made before, by inference (only that it fails), or by a new trial."""
        islands = merged(names)
        if islands not in self.made and self.surely_fails(islands):
            return False
        return self.try_out(islands).outcome.passes

    def surely_fails(self, islands: frozenset[str]) -> bool:
        """Say whether a trial that failed covers the set, as far as that can be relied on."""
        failed = (trial.islands for trial in self.made.values() if not trial.outcome.passes)
        return self.monotone and any(covers(larger, islands) for larger in failed)

    def try_out(self, names: Iterable[str]) -> Trial:
        """Return the trial of a set; the one made before where there is one.

        Raises:
            Spent: It would be one more than the most.
            Enough: It would be one more than refinement may use.
        """
        islands = merged(names)
        if islands not in self.made:
            if self._most is not None and len(self.made) >= self._most:
                raise Spent
            if self._refining and len(self.made) >= self.enough:
                raise Enough
            trial = Trial(islands=islands, outcome=self._evaluate(islands), cost=self.cost(islands))
            self.monotone = self.monotone and not any(_contradict(trial, other) for other in self.made.values())
            self.made[islands] = trial
        return self.made[islands]

    @contextmanager
    def refining(self) -> Iterator[None]:
        """Within it trials are made only while there are fewer than enough; else it ends, and `unrefined` says so."""
        self._refining, self.unrefined = True, False
        try:
            yield
        except Enough:
            self.unrefined = True
        finally:
            self._refining = False

    def best(self) -> Trial | None:
        """Return the cheapest trial that passed, of equal ones that with the fewest islands."""
        return min((trial for trial in self.made.values() if trial.outcome.passes), key=lambda t: t.order, default=None)

    def front(self) -> tuple[Trial, ...]:
        """Return the trials that no other beats in both cost and error, by ascending cost."""
        front: list[Trial] = []
        for trial in sorted(self.made.values(), key=lambda t: (t.cost, t.outcome.error, t.order)):
            if not front or trial.outcome.error < front[-1].outcome.error:
                front.append(trial)
        return tuple(front)


def _contradict(one: Trial, other: Trial) -> bool:
    """Say whether one of two trials passed and the other one failed although it has all of its islands."""
    if one.outcome.passes == other.outcome.passes:
        return False
    passed, failed = (one, other) if one.outcome.passes else (other, one)
    return covers(failed.islands, passed.islands)

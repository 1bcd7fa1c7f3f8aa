"""Write a set of modules as few patterns: `layers.0.norm`, `layers.1.norm`, ... -> `layers.*.norm`.

Patterns are those of floatline.select, and select exactly the set: what else a pattern would match in this model rules
it out. They are made from the names in the set, with components replaced by

    `*`                       any component
    `norm*`, `fc_*`, `*_proj`   what is left of a name without its number, or one side of its first or last underscore
    `[0-3]`, `1[2-5]`          a run of layer numbers that differ in their last digit
    `**`                      any number of components in a row, once in a pattern; the others are literal then, but
                              for the last one where it stands alone behind the `**`

and as few of them as cover the set are chosen: the fewest there are, by branch and bound, unless that takes too long;
then greedily. A pattern with fewer and narrower wildcards is preferred among those that match the same modules.

Not covered: other globs (`?`, `[abc]`, `*` in the middle of a component), several `**`, and lists in which a later
rule takes back what an earlier one selects; policies have no such rules. A list made for one model may match more in
another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from glob import escape
from itertools import product

from floatline.errors import ConfigError, did_you_mean
from floatline.select import matches

MANY_POSITIONS = 4
"""Where names of one depth differ in more components than this, each of them is either literal or `*`."""
MOST_NODES = 5_000
"""Nodes of branch and bound after which the greedy cover is taken."""


def shortest_patterns(chosen: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """Return the fewest patterns that match exactly the modules `chosen`.

    Args:
        chosen: Dotted module names.
        names: Dotted names of all modules of the model; the model itself (the empty name) does not count.

    Returns:
        Patterns, sorted; none where nothing is chosen.

    Raises:
        ConfigError: A chosen module that the model has not, or one whose name no pattern tells from another's.

    >>> names = ["norm", "layers"] + [f"layers.{i}{part}" for i in range(12) for part in ("", ".fc", ".norm")]
    >>> shortest_patterns([f"layers.{i}.norm" for i in range(12)], names)
    ('layers.*.norm',)
    >>> shortest_patterns(["norm", "layers.0.fc", "layers.1.fc", "layers.2.fc", "layers.11.fc"], names)
    ('layers.11.fc', 'layers.[0-2].fc', 'norm')
    """
    known = sorted(set(names) - {""})
    strangers = sorted(set(chosen) - set(known))
    if strangers:
        raise ConfigError(f"the model has no module {strangers[0]!r}", hint=did_you_mean(strangers[0], known))
    index = _Index(known)
    wanted = index.bits(chosen)
    usable: dict[int, str] = {}
    for pattern, matched in _candidates(sorted(set(chosen)), index):
        if not matched & ~wanted and (matched not in usable or _plainness(pattern) < _plainness(usable[matched])):
            usable[matched] = pattern
    hidden = wanted & ~_union(usable)
    if hidden:
        name = known[hidden.bit_length() - 1]
        raise ConfigError(
            f"no pattern matches the module {name!r} alone", hint="rename it: policies cannot hold =, ; or spaces"
        )
    found = tuple(sorted(_plainest(wanted, _fewest(wanted, usable), usable)))
    assert {name for name in known if any(matches(pattern, name) for pattern in found)} == set(chosen)
    return found


def literal(name: str) -> str:
    """Return a pattern that matches a dotted name; what a policy string cannot hold becomes `?`.

    >>> literal("layers.0.fc"), literal("heads.a b.x*")
    ('layers.0.fc', 'heads.a?b.x[*]')
    """
    return ".".join(map(_literal, name.split(".")))


class _Index:
    """All names by component, so that what a pattern matches is an intersection of sets of bits, one bit a name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.place = {name: place for place, name in enumerate(names)}
        self._at: dict[tuple[int, int], dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._heads: dict[tuple[str, ...], int] = defaultdict(int)
        self._tails: dict[tuple[str, ...], int] = defaultdict(int)
        self._deeper: dict[int, int] = defaultdict(int)
        for name, place in self.place.items():
            parts, bit = tuple(name.split(".")), 1 << place
            for position, part in enumerate(parts):
                self._at[len(parts), position][part] |= bit
            for length in range(len(parts) + 1):
                self._heads[parts[:length]] |= bit
                self._tails[parts[len(parts) - length :]] |= bit
                self._deeper[length] |= bit
        self.matched_at = cache(self._matched_at)

    def bits(self, names: Iterable[str]) -> int:
        return _union(1 << self.place[name] for name in names)

    def _matched_at(self, depth: int, position: int, glob: str) -> int:
        return _union(bits for part, bits in self._at[depth, position].items() if fnmatchcase(part, glob))

    def matched(self, globs: Sequence[str]) -> int:
        """Return the names that match the components, of which none is `**`."""
        found = -1
        for position, glob in enumerate(globs):
            found &= self.matched_at(len(globs), position, glob)
        return found

    def matched_around(self, head: tuple[str, ...], tail: tuple[str, ...]) -> int:
        """Return the names that match `head.**.tail`, all literal."""
        return self._heads[head] & self._tails[tail] & self._deeper[len(head) + len(tail)]

    def matched_below(self, head: tuple[str, ...], glob: str) -> int:
        """Return the names that match `head.**.glob`."""
        ends = (tail for tail in self._tails if len(tail) == 1 and fnmatchcase(tail[0], glob))
        return _union(self.matched_around(head, tail) for tail in list(ends))


def _candidates(chosen: Sequence[str], index: _Index) -> Iterator[tuple[str, int]]:
    """Yield patterns that match at least one chosen name, with the bits of the names that they match."""
    by_depth: dict[int, list[list[str]]] = defaultdict(list)
    for name in chosen:
        by_depth[name.count(".")].append(name.split("."))
    for group in by_depth.values():
        tried: set[tuple[str, ...]] = set()
        columns = [set(column) for column in zip(*group)]
        many = sum(len(column) > 1 for column in columns) > MANY_POSITIONS
        options = [_options(column, many) for column in columns]
        for parts in group:
            tried.update(product(*(options[position][part] for position, part in enumerate(parts))))
        yield from ((".".join(globs), index.matched(globs)) for globs in sorted(tried))
    yield from _deep_candidates([name.split(".") for name in chosen], index)


def _deep_candidates(chosen: Sequence[Sequence[str]], index: _Index) -> Iterator[tuple[str, int]]:
    """Yield those with `**`; none from names that cannot be written literally."""
    literal = [tuple(parts) for parts in chosen if all(_literal(part) == part for part in parts)]
    around = {(p[:begin], p[end:]) for p in literal for end in range(len(p) + 1) for begin in range(end + 1)}
    for head, tail in sorted(around):
        yield ".".join((*head, "**", *tail)), index.matched_around(head, tail)
    below = {(parts[:begin], glob) for parts in literal for glob in _globs(parts[-1]) for begin in range(len(parts))}
    for head, glob in sorted(below):
        yield ".".join((*head, "**", glob)), index.matched_below(head, glob)


def _options(column: set[str], many: bool) -> Mapping[str, list[str]]:
    """Return what may stand for each of the components that chosen names have at one place."""
    if len(column) == 1 or many:
        return {part: [_literal(part)] + ["*"] * (len(column) > 1) for part in column}
    runs = _runs(column)
    return {part: [_literal(part), "*", *_globs(part), *runs.get(part, ())] for part in column}


def _literal(part: str) -> str:
    """Return a glob for one component; what a policy string cannot hold becomes `?`."""
    return "".join("?" if char in "=;" or char.isspace() else escape(char) for char in part)


def _globs(part: str) -> Iterator[str]:
    stem = part.rstrip("0123456789")
    if stem not in ("", part):
        yield _literal(stem) + "*"
    if "_" in part.strip("_"):
        first, last = part.partition("_")[0], part.rpartition("_")[2]
        yield from ([_literal(first) + "_*"] if first else []) + (["*_" + _literal(last)] if last else [])


def _runs(column: set[str]) -> dict[str, list[str]]:
    """Return the longest runs of numbers by their last digit, for each number in one: 3, 4, 5 -> `[3-5]`."""
    found: dict[str, list[str]] = {}
    numbers = {part for part in column if part.isascii() and part.isdigit()}
    for front in sorted({number[:-1] for number in numbers}):
        digits = "".join(digit if front + digit in numbers else " " for digit in "0123456789")
        for run in digits.split():
            if len(run) > 1:
                found.update({front + digit: [f"{front}[{run[0]}-{run[-1]}]"] for digit in run})
    return found


def _plainness(pattern: str) -> tuple[int, int, int, str]:
    """Order patterns that match the same: fewer `**`, fewer other wildcards, shorter."""
    deep = pattern.split(".").count("**")
    return deep, pattern.count("*") + pattern.count("[") + pattern.count("?"), len(pattern), pattern


def _union(sets: Iterable[int]) -> int:
    found = 0
    for bits in sets:
        found |= bits
    return found


def _fewest(wanted: int, usable: Mapping[int, str]) -> list[int]:
    """Return as few of the usable sets as cover the wanted one."""
    order = sorted(usable, key=lambda bits: (-bits.bit_count(), _plainness(usable[bits])))
    largest: list[int] = []  # of a set and one that holds it, the larger is never worse
    for bits in order:
        if not any(bits & ~other == 0 for other in largest):
            largest.append(bits)
    greedy: list[int] = []
    while wanted & ~_union(greedy):
        rest = wanted & ~_union(greedy)
        greedy.append(max(largest, key=lambda bits: (bits & rest).bit_count()))
    nodes = [MOST_NODES]
    for size in range(len(greedy)):
        exact = _cover(wanted, largest, size, nodes)
        if exact is not None:
            return exact
    return greedy


def _plainest(wanted: int, cover: Sequence[int], usable: Mapping[int, str]) -> list[str]:
    """Return a pattern for each set of a cover: the plainest that matches what the others leave to it."""
    cover, found = list(cover), []
    for place in range(len(cover)):
        left = wanted & ~_union(cover[:place] + cover[place + 1 :])
        cover[place] = min((bits for bits in usable if not left & ~bits), key=lambda bits: _plainness(usable[bits]))
        found.append(usable[cover[place]])
    return found


def _cover(rest: int, sets: Sequence[int], size: int, nodes: list[int]) -> list[int] | None:
    """Return at most `size` sets that cover the rest; None where there are none or no nodes are left."""
    nodes[0] -= 1
    if not rest:
        return []
    if nodes[0] < 0 or rest.bit_count() > size * max((bits & rest).bit_count() for bits in sets):
        return None
    lowest = rest & -rest
    for bits in sets:
        if bits & lowest:
            others = _cover(rest & ~bits, sets, size - 1, nodes)
            if others is not None:
                return [bits, *others]
    return None

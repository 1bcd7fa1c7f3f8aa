"""The caching allocator replayed: every rule on a case computed by hand, and all of them against a naive allocator."""

import json
import os
import random
import subprocess
import sys
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floatline.errors import ConfigError, TraceError
from floatline.plan.allocator import AllocatorSettings, Replay, simulate

MIB = 2**20
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def trace(text: str, unit: float = MIB) -> list[tuple[int, int]]:
    """ "a5 b10 -a" allocates 5 units as a, 10 as b, and frees a."""
    events = []
    for word in text.split():
        events.append((ord(word[1]), -1) if word[0] == "-" else (ord(word[0]), int(float(word[1:]) * unit)))
    return events


def mib(text: str, knobs: str = "", capacity: int | None = None, **more) -> Replay:
    return simulate(trace(text), AllocatorSettings.parse(knobs), None if capacity is None else capacity * MIB, **more)


# --- sizes: rounding, segments, what is split off ---------------------------------------------------------------------

SIZES = [
    # requested, allocated, reserved, allocated and reserved with expandable segments
    (1, 512, 2 * MIB, 512, 2 * MIB),
    (512, 512, 2 * MIB, 512, 2 * MIB),
    (513, 1024, 2 * MIB, 1024, 2 * MIB),
    (MIB, MIB, 2 * MIB, MIB, 2 * MIB),
    (MIB + 1, MIB + 512, 20 * MIB, MIB + 512, 20 * MIB),
    (10 * MIB - 512, 10 * MIB - 512, 20 * MIB, 10 * MIB - 512, 20 * MIB),
    (10 * MIB - 1, 10 * MIB, 10 * MIB, 10 * MIB, 20 * MIB),  # rounded to 10 MiB, so a segment of its own
    (10 * MIB + 1, 10 * MIB + 512, 12 * MIB, 10 * MIB + 512, 20 * MIB),
    (11 * MIB - 512, 11 * MIB - 512, 12 * MIB, 11 * MIB - 512, 20 * MIB),  # 1 MiB + 512 is left: split off
    (11 * MIB, 12 * MIB, 12 * MIB, 11 * MIB, 20 * MIB),  # exactly 1 MiB is left: not split, all of it counts
    (11 * MIB + 1, 12 * MIB, 12 * MIB, 11 * MIB + 512, 20 * MIB),
    (30 * MIB, 30 * MIB, 30 * MIB, 30 * MIB, 40 * MIB),
]


@pytest.mark.parametrize(("size", "allocated", "reserved", "allocated_expandable", "reserved_expandable"), SIZES)
def test_one_request(size, allocated, reserved, allocated_expandable, reserved_expandable):
    plain, expandable = simulate([(0, size)]), simulate([(0, size)], EXPANDABLE)
    assert (plain.peak_allocated, plain.peak_reserved) == (allocated, reserved)
    assert (expandable.peak_allocated, expandable.peak_reserved) == (allocated_expandable, reserved_expandable)
    assert plain.peak_requested == expandable.peak_requested == size
    assert plain.segments == expandable.segments == 1


def test_small_requests_share_a_segment_to_the_last_block():
    blocks = [(i, 512) for i in range(4096)]
    assert simulate(blocks).peak_reserved == 2 * MIB
    assert simulate([*blocks, (5000, 1)]).peak_reserved == 4 * MIB


def test_small_and_large_requests_never_share():
    assert mib("a1 -a b2").peak_reserved == 22 * MIB
    assert mib("a2 -a b1").peak_reserved == 22 * MIB
    assert mib("a1 -a b2", "expandable_segments:True").segments == 2


def test_a_large_segment_serves_several_requests():
    assert mib("a9 b9 c2").peak_reserved == 20 * MIB
    assert mib("a9 b9 c2").peak_allocated == 20 * MIB
    assert mib("a9 b9 c3").peak_reserved == 40 * MIB


def test_a_reused_block_that_is_not_cut_counts_as_a_whole():
    replay = mib("a12 -a b11.5")
    assert (replay.end_allocated, replay.end_reserved, replay.peak_requested) == (12 * MIB, 12 * MIB, 12 * MIB)
    assert mib("a12 -a b11.5", "expandable_segments:True").end_allocated == 11.5 * MIB


def test_large_segment_size_applies_to_segments_and_pages():
    assert mib("a2", "large_segment_size_mb:32").peak_reserved == 32 * MIB
    assert mib("a33", "large_segment_size_mb:32,expandable_segments:True").peak_reserved == 64 * MIB


def test_sizes_round_up_between_powers_of_two():
    """Four steps between powers of two: 1, 1.25, 1.5, 1.75 MiB; 32, 40, 48, 56 MiB."""
    assert simulate([(0, 1200 * 1024)], AllocatorSettings(roundup_power2_divisions=4)).peak_allocated == 1280 * 1024
    assert simulate([(0, 33 * MIB)], AllocatorSettings(roundup_power2_divisions=4)).peak_allocated == 40 * MIB


# --- best fit and merging ---------------------------------------------------------------------------------------------


def test_the_smallest_block_that_fits_is_taken():
    """14 fits into the freed 16 and 30; taken from 30, the last request would need a segment of its own."""
    assert mib("a30 b16 -a -b c14 d30").peak_reserved == 46 * MIB


def test_of_equal_blocks_the_lowest_is_taken():
    """a and c are both free; d must take a, for only then does the free c merge with b to hold 10 MiB."""
    assert mib("a5 b5 c5 e5 -c -a d5 -b f10").peak_reserved == 20 * MIB


@pytest.mark.parametrize("order", ["-a -b -c", "-a -c -b", "-b -a -c", "-b -c -a", "-c -a -b", "-c -b -a"])
def test_freed_neighbours_merge_in_any_order(order):
    for knobs in ("", "expandable_segments:True"):
        assert mib(f"a5 b5 c5 d5 {order} e15", knobs).peak_reserved == 20 * MIB


def test_blocks_of_different_segments_do_not_merge():
    assert mib("a20 b20 -a -b c40").peak_reserved == 80 * MIB
    assert mib("a20 b20 -a -b c40", "expandable_segments:True").peak_reserved == 40 * MIB


def test_an_expandable_segment_grows_behind_its_free_end():
    """10 of 20 MiB are free at the end; 25 need one more page, not two."""
    assert mib("a10 b25", "expandable_segments:True").peak_reserved == 40 * MIB


def test_holes_are_preferred_to_the_end_that_can_grow():
    """Both the hole (5) and the end (7.5) hold 5; with the end taken, f would need a page."""
    assert mib("a5 b7.5 -a d5 f7.5", "expandable_segments:True").peak_reserved == 20 * MIB
    assert mib("a8 b7 -a d5 f5 g3", "expandable_segments:True").peak_reserved == 20 * MIB


# --- when the driver has no more --------------------------------------------------------------------------------------


def test_cached_segments_are_returned_before_memory_runs_out():
    replay = mib("a12 b14 c16 -a -c d30", capacity=50)
    assert (replay.out_of_memory, replay.retries, replay.end_reserved) == (None, 1, 44 * MIB)
    assert replay.peak_reserved == 44 * MIB


def test_a_segment_in_use_anywhere_cannot_be_returned():
    replay = mib("a5 b10 -b c16", capacity=30)
    assert (replay.out_of_memory, replay.retries) == (3, 1)
    assert (replay.end_allocated, replay.end_reserved, replay.segments) == (5 * MIB, 20 * MIB, 1)


def test_the_replay_ends_where_memory_runs_out():
    events = [*trace("a12 b30"), (0, -1)]  # the last event would be an error
    replay = simulate(events, capacity=30 * MIB, keep_curve=True)
    assert (replay.out_of_memory, replay.peak_allocated, replay.peak_index) == (1, 12 * MIB, 0)
    assert list(replay.curve.allocated) == [12 * MIB]


def test_fragments_can_fail_what_expandable_segments_serve():
    """28 MiB of 60 are free in both, but in segments only as 12 and 16."""
    assert mib("a12 b14 c16 x18 -a -c d28", capacity=60).out_of_memory is None  # whole segments: returned
    scattered = "a6 b6 c6 d6 e6 f6 g6 h6 i6 -a -b -d -e -g -h j18"
    assert mib(scattered, capacity=60).out_of_memory == 15
    assert mib("a12 b14 c16 x18 -a -c d28", "expandable_segments:True", capacity=60).retries == 1


def test_wholly_free_pages_are_unmapped_and_mapped_again():
    """b leaves the hole 15..45, of which one page (20..40) is free; later 25 MiB are laid over 15..40."""
    knobs = "expandable_segments:True"
    flushed = mib("a15 b30 c5 u1 v1 -b w1", knobs, capacity=62)
    assert (flushed.retries, flushed.end_reserved, flushed.segments) == (1, 44 * MIB, 3)
    again = mib("a15 b30 c5 u1 v1 -b w1 -w x25", knobs, capacity=62)
    assert (again.out_of_memory, again.retries, again.end_reserved, again.segments) == (None, 2, 62 * MIB, 2)
    assert mib("a15 b30 c5 u1 v1 -b w1 x25", knobs, capacity=62).out_of_memory == 7


def test_torch_looks_at_its_own_fraction_first():
    """It must hold the segment that the request would take, whatever is mapped in the end: 20 + 20 is above 21."""
    half = "per_process_memory_fraction:0.5"
    assert mib("a30", half, capacity=60).out_of_memory is None
    assert mib("a31", half, capacity=60).out_of_memory == 0
    assert mib("a31", half, capacity=60, device_memory=64 * MIB).out_of_memory is None
    assert mib("a31", half).out_of_memory is None
    assert mib("a9 b9", f"{half},expandable_segments:True", capacity=42).out_of_memory is None
    assert mib("a9 b9 c3", f"{half},expandable_segments:True", capacity=42).out_of_memory == 2


# --- oversize blocks and garbage collection ---------------------------------------------------------------------------


def test_oversize_blocks_are_kept_for_oversize_requests():
    knobs = "max_split_size_mb:20"
    assert mib("a40 -a b10", knobs).peak_reserved == 50 * MIB
    assert mib("a20 -a b10", knobs).peak_reserved == 30 * MIB
    whole = mib("a40 -a b25", knobs)
    assert (whole.end_allocated, whole.end_reserved) == (40 * MIB, 40 * MIB)
    assert mib("a40 -a b20", knobs).peak_reserved == 60 * MIB  # 20 MiB too large
    assert mib("a40 -a b20", f"{knobs},max_non_split_rounding_mb:21").peak_reserved == 40 * MIB
    assert mib("a40 -a b10").peak_reserved == 40 * MIB


def test_only_as_many_oversize_blocks_are_returned_as_needed():
    knobs = "max_split_size_mb:20"
    one = mib("a46 b24 -a -b c70", knobs, capacity=120)  # 46 + 24 both go
    assert (one.retries, one.end_reserved) == (0, 70 * MIB)
    single = mib(
        "a46 b90 c12 -a -b -c d24", knobs, capacity=150
    )  # a is too large to use and the smallest that suffices
    assert (single.retries, single.end_reserved) == (0, (90 + 12 + 24) * MIB)
    two = mib("a46 b24 c22 -a -b -c d60", knobs, capacity=92)  # the largest first: 46 + 24 are enough, 22 stay
    assert (two.retries, two.end_reserved) == (0, 82 * MIB)
    short = mib("a22 c40 d12 -a -d e60", knobs, capacity=100)  # 22 are not enough: everything goes
    assert (short.retries, short.end_reserved) == (1, 100 * MIB)
    near = mib("a22 c40 d12 -a -d e46", knobs, capacity=100)  # with what is left 22 would do, but they alone are not 46
    assert (near.retries, near.end_reserved) == (1, 86 * MIB)


def test_idle_segments_are_collected_above_the_threshold():
    """Of 96 MiB held 26 are above 0.7 of the 100 allowed; a, freed first, is older than average and suffices."""
    run = "a30 b32 -a c34 -b d34"
    collect = "per_process_memory_fraction:0.5,garbage_collection_threshold:0.7"
    assert mib(run, collect, capacity=200).end_reserved == 100 * MIB
    assert mib(run, collect, capacity=200).retries == 0
    both = "per_process_memory_fraction:0.5,garbage_collection_threshold:0.65"  # 31 above: b goes as well
    assert mib(run, both, capacity=200).end_reserved == 68 * MIB


def test_without_a_fraction_nothing_is_collected():
    assert mib("a30 b32 -a c34 -b d34", "garbage_collection_threshold:0.1", capacity=200).end_reserved == 130 * MIB


# --- the interface ----------------------------------------------------------------------------------------------------


def test_peak_index_is_the_first_event_at_the_peak():
    assert mib("a2 b3 -a c2 -b").peak_index == 1
    assert mib("a2 b3 -a c4 -b").peak_index == 3
    assert simulate([]).peak_index is None


def test_the_curve_has_one_value_an_event():
    replay = simulate([(0, 512), (1, 0), (0, -512), (0, 3 * MIB)], keep_curve=True)
    assert list(replay.curve.allocated) == [512, 512, 0, 3 * MIB]
    assert list(replay.curve.reserved) == [2 * MIB, 2 * MIB, 2 * MIB, 22 * MIB]
    assert simulate([(0, 512)]).curve is None


def test_impossible_traces_are_refused():
    with pytest.raises(TraceError, match=r"event 1 allocates storage 7, which is already allocated"):
        simulate([(7, 10), (7, 10)])
    with pytest.raises(TraceError, match=r"event 2 frees storage 7, which is not allocated"):
        simulate([(7, 10), (7, -10), (7, -10)])
    with pytest.raises(ValueError, match=r"frees storage 3"):
        simulate([(3, -1)])
    with pytest.raises(ConfigError, match=r"capacity is -1 bytes; allowed: 0 or more"):
        simulate([], capacity=-1)


# --- properties -------------------------------------------------------------------------------------------------------

LENGTHS = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(MIB, 11 * MIB),
    st.integers(1, 40).map(lambda n: n * MIB),
    st.integers(1, 80).map(lambda n: n * MIB // 2),
    st.integers(1, 6).map(lambda n: n * 512),
)
KNOB_TEXTS = ["", "expandable_segments:True", "max_split_size_mb:20", "expandable_segments:True,max_split_size_mb:20",
              "max_split_size_mb:22,max_non_split_rounding_mb:30", "roundup_power2_divisions:4",
              "large_segment_size_mb:12", "expandable_segments:True,large_segment_size_mb:12",
              "per_process_memory_fraction:0.75",
              "per_process_memory_fraction:0.75,expandable_segments:True"]  # fmt: skip
KNOBS = st.sampled_from(KNOB_TEXTS).map(AllocatorSettings.parse)


@st.composite
def traces(draw) -> list[tuple[int, int]]:
    """Allocations, each freed some allocations later, or never."""
    pieces = draw(st.lists(st.tuples(LENGTHS, st.integers(0, 12) | st.just(10**6)), max_size=60))
    due: dict[int, list[int]] = {}
    events = []
    for name, (size, life) in enumerate(pieces):
        events.append((name, size))
        due.setdefault(name + life, []).append(name)
        events.extend((old, -1) for old in due.pop(name, []))
    return events


@settings(max_examples=200, deadline=None)
@given(traces(), KNOBS, st.none() | st.integers(0, 120))
def test_bounds_hold_at_every_event(events, knobs, capacity):
    limit = None if capacity is None else capacity * MIB
    replay = simulate(events, knobs, limit, keep_curve=True)
    assert replay.peak_requested <= replay.peak_allocated <= replay.peak_reserved
    assert all(used <= held for used, held in zip(replay.curve.allocated, replay.curve.reserved))
    assert all(used % 512 == 0 for used in replay.curve.allocated)
    assert limit is None or replay.peak_reserved <= limit
    assert len(replay.curve.allocated) == (len(events) if replay.out_of_memory is None else replay.out_of_memory)
    if replay.peak_index is not None:
        assert replay.curve.allocated[replay.peak_index] == replay.peak_allocated == max(replay.curve.allocated)


@settings(max_examples=100, deadline=None)
@given(traces(), KNOBS)
def test_all_freed_leaves_nothing_allocated_and_everything_reserved(events, knobs):
    born = {name for name, change in events if change > 0}
    freed = {name for name, change in events if change < 0}
    replay = simulate([*events, *((name, -1) for name in born - freed)], knobs)
    assert (replay.end_allocated, replay.end_reserved) == (0, replay.peak_reserved)


@settings(max_examples=100, deadline=None)
@given(traces(), KNOBS, st.none() | st.integers(0, 120), st.randoms(use_true_random=False))
def test_names_do_not_matter(events, knobs, capacity, dice: random.Random):
    names = list(range(len(events)))
    dice.shuffle(names)
    limit = None if capacity is None else capacity * MIB
    assert simulate([(names[name], n) for name, n in events], knobs, limit) == simulate(iter(events), knobs, limit)


@settings(max_examples=100, deadline=None)
@given(traces(), KNOBS)
def test_capacity_matters_only_where_it_is_short(events, knobs):
    free = simulate(events, knobs)
    if knobs.per_process_memory_fraction == 1:
        assert simulate(events, knobs, free.peak_reserved) == free
        if free.peak_reserved:
            assert simulate(events, knobs, free.peak_reserved - 1).retries > 0 or knobs.oversize < float("inf")


@settings(max_examples=100, deadline=None)
@given(st.lists(LENGTHS, max_size=60))
def test_an_expandable_segment_wastes_less_than_a_page_while_nothing_is_freed(sizes):
    replay = simulate(enumerate(sizes), EXPANDABLE)
    rounded = [-(-size // 512) * 512 for size in sizes]
    small, large = sum(n for n in rounded if n <= MIB), sum(n for n in rounded if n > MIB)
    assert replay.peak_allocated == small + large
    assert replay.peak_reserved == -(-small // (2 * MIB)) * 2 * MIB + -(-large // (20 * MIB)) * 20 * MIB


# --- against a naive allocator ----------------------------------------------------------------------------------------


class Naive:
    """The same rules on bare intervals: no blocks, no links, nothing kept sorted; what is free is found anew each time.

    A pool is a list of held stretches (start, length). Of an expandable pool they are single pages.
    """

    def __init__(self, knobs: AllocatorSettings, capacity: int | None):
        self.knobs, self.capacity = knobs, float("inf") if capacity is None else capacity
        fraction = knobs.per_process_memory_fraction
        self.allowed = float("inf") if capacity is None or fraction == 1 else int(fraction * capacity)
        self.held = {True: [], False: []}
        self.live = {}
        self.top = count(step=2**40)
        self.retries = self.peak_reserved = 0

    def page(self, small):
        return 2 * MIB if small else self.knobs.large_segment

    def reserved(self):
        return sum(length for pool in self.held.values() for _, length in pool)

    def runs(self, small):
        """Stretches that are held in one piece: segments, or neighbouring pages."""
        merged = []
        for start, length in sorted(self.held[small]):
            if self.knobs.expandable_segments and merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        return merged

    def used(self, small):
        return sorted((start, size) for kind, start, size, _ in self.live.values() if kind == small)

    def holes(self, small):
        found = []
        for start, length in self.runs(small):
            at = start
            for begin, size in [u for u in self.used(small) if start <= u[0] < start + length] + [(start + length, 0)]:
                found += [(begin - at, at)] if begin > at else []
                at = begin + size
        return found

    def reach(self, small, hole):
        size, start = hole
        ends = [begin + length for begin, length in self.runs(small)]
        if start + size not in ends:
            return size
        return min([begin for begin, _ in self.runs(small) if begin >= start + size], default=2**60) - start

    def fit(self, small, size):
        fits = sorted(hole for hole in self.holes(small) if hole[0] >= size)
        while self.knobs.expandable_segments and len(fits) > 1 and (
            self.reach(small, fits[1]) < self.reach(small, fits[0])
        ):  # fmt: skip
            fits = fits[1:]
        limit = (self.knobs.max_split_size_mb or 2**40) * MIB
        slack = (self.knobs.max_non_split_rounding_mb or self.knobs.large_segment_size_mb) * MIB
        if not fits or (size < limit <= fits[0][0]) or (size >= limit and fits[0][0] >= size + slack):
            return None
        return fits[0]

    def more(self, small, size):
        if size <= MIB:
            length = 2 * MIB
        elif size < 10 * MIB:
            length = self.knobs.large_segment
        else:
            length = (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        if self.reserved() + length > self.allowed:
            return None
        if self.knobs.expandable_segments:
            return self.more_pages(small, size)
        if self.reserved() + length > self.capacity:
            return None
        self.held[small].append((next(self.top), length))
        return length, self.held[small][-1][0]

    def more_pages(self, small, size):
        page = self.page(small)
        mapped = {start for start, _ in self.held[small]}
        gaps = [at for at in {0, *(start + page for start in mapped)} if at not in mapped]
        for gap in sorted(gaps):
            begin = next((start for length, start in self.holes(small) if start + length == gap), gap)
            end = min([start for start, _ in self.used(small) if start >= begin], default=2**60)
            if end - begin >= size:
                break
        missing = [at for at in range(begin // page * page, begin + size, page) if at not in mapped]
        while missing:  # one gap is mapped or not as a whole
            gap = [at for i, at in enumerate(missing) if at == missing[0] + i * page]
            if self.reserved() + len(gap) * page > self.capacity:
                return None
            self.held[small] += [(at, page) for at in gap]
            missing = missing[len(gap) :]
            self.peak_reserved = max(self.peak_reserved, self.reserved())
        return next(hole for hole in self.holes(small) if hole[1] == begin)

    def drop(self, small, stretches):
        self.held[small] = [stretch for stretch in self.held[small] if stretch not in stretches]

    def idle(self, small):
        return [s for s in self.held[small] if not any(u[0] < sum(s) and sum(u) > s[0] for u in self.used(small))]

    def drop_oversize(self, small, size):
        if self.knobs.max_split_size_mb is None or self.knobs.expandable_segments:
            return False
        limit = self.knobs.max_split_size_mb * MIB
        large = sorted(((length, start) for start, length in self.idle(small) if length >= limit), reverse=True)
        enough = [entry for entry in large if entry[0] >= size]
        if enough:
            self.drop(small, [min(enough)[::-1]])
            return True
        total = 0
        for length, start in large:
            if total < max(size, limit):
                total += length
                self.drop(small, [(start, length)])
        return total >= max(size, limit)

    def allocate(self, name, requested):
        size = self.knobs.round_size(requested)
        small = size <= MIB
        hole = self.fit(small, size) or self.more(small, size)
        if hole is None and self.drop_oversize(small, size):
            hole = self.more(small, size)
        if hole is None:
            self.retries += 1
            for pool in (False, True):
                self.drop(pool, self.idle(pool))
            hole = self.more(small, size)
        if hole is None:
            return False
        rest = hole[0] - size
        if small or self.knobs.expandable_segments:
            cut = rest >= 512
        else:
            cut = rest > MIB and size < (self.knobs.max_split_size_mb or 2**40) * MIB
        self.live[name] = (small, hole[1], size if cut else hole[0], requested)
        self.peak_reserved = max(self.peak_reserved, self.reserved())
        return True

    def replay(self, events) -> Replay:
        peaks, broken = [(0, 0, None)], None
        for index, (name, change) in enumerate(events):
            if change < 0:
                del self.live[name]
            elif not self.allocate(name, change):
                broken = index
                break
            totals = [sum(piece[k] for piece in self.live.values()) for k in (2, 3)]
            peaks.append((*totals, index))
        best = max(peaks, key=lambda peak: peak[0])
        return Replay(
            peak_allocated=best[0], peak_index=best[2], peak_requested=max(peak[1] for peak in peaks),
            peak_reserved=self.peak_reserved, end_allocated=sum(piece[2] for piece in self.live.values()),
            end_reserved=self.reserved(), segments=len(self.runs(True)) + len(self.runs(False)),
            out_of_memory=broken, retries=self.retries,
        )  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(traces(), KNOBS, st.none() | st.integers(0, 120))
def test_a_naive_allocator_does_the_same(events, knobs, capacity):
    limit = None if capacity is None else capacity * MIB
    assert simulate(events, knobs, limit) == Naive(knobs, limit).replay(events)


def lively(dice: random.Random) -> list[tuple[int, int]]:
    """A trace in which about as much is freed as allocated, in any order."""
    events, live = [], []
    for name in range(dice.randrange(10, 120)):
        if live and dice.random() < 0.48:
            events.append((live.pop(dice.randrange(len(live))), -1))
        else:
            least, most, unit = dice.choice([(1, 3 * MIB, 1), (MIB, 11 * MIB, 1), (1, 60, MIB), (1, 80, MIB // 2)])
            events.append((name, dice.randrange(least, most) * unit))
            live.append(name)
    return events


def test_a_naive_allocator_does_the_same_where_memory_is_nearly_short():
    """Capacities just below what would be reserved: many runs return memory and go on."""
    dice, survived = random.Random(0), 0
    for knobs in KNOB_TEXTS * 150:
        parsed, events = AllocatorSettings.parse(knobs), lively(dice)
        limit = int(simulate(events, parsed).peak_reserved * dice.uniform(0.8, 1) / parsed.per_process_memory_fraction)
        replay = simulate(events, parsed, limit)
        survived += replay.retries > 0 and replay.out_of_memory is None
        assert replay == Naive(parsed, limit).replay(events), (knobs, limit, events)
    assert survived > 100


# --- against the real one ---------------------------------------------------------------------------------------------

ON_THE_DEVICE = """
import json, sys, torch
live, seen = {}, []
for name, change in json.load(sys.stdin):
    if change > 0:
        live[name] = torch.empty(change, dtype=torch.uint8, device="cuda")
    else:
        del live[name]
    seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
print(json.dumps([seen, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "knobs", ["", "expandable_segments:True", "max_split_size_mb:20", "roundup_power2_divisions:4"]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_allocator_of_a_gpu_does_the_same(knobs, seed):
    """Bytes after every event, as a process with these settings sees them."""
    events = lively(random.Random(seed))
    env = {**os.environ, "PYTORCH_ALLOC_CONF": knobs, "PYTORCH_CUDA_ALLOC_CONF": knobs}
    run = [sys.executable, "-c", ON_THE_DEVICE]
    done = subprocess.run(run, input=json.dumps(events), capture_output=True, text=True, check=True, env=env)
    replay = simulate(events, AllocatorSettings.parse(knobs), keep_curve=True)
    ours = [list(pair) for pair in zip(replay.curve.allocated, replay.curve.reserved)]
    assert json.loads(done.stdout) == [ours, replay.peak_allocated, replay.peak_reserved]

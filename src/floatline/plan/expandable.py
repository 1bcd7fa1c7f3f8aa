"""A pool with expandable segments: one address range that is mapped page by page.

Old and new memory form one block here, where segments would leave a remainder each; and every page that is wholly free
can go back to the driver, not only whole segments. Blocks that are free, in use or without memory lie in one chain by
address, the last one being the open end.

When nothing cached serves a request, pages are mapped at the lowest address where it fits: in gaps that were returned
earlier, or at the end, behind a free block if one lies there.

Not covered: a second address range. torch begins one when the first, 9/8 of the device's memory, has no room left; here
a range has no end.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from floatline.plan.allocator_settings import SMALL_SEGMENT, SMALLEST_BLOCK, AllocatorSettings
from floatline.plan.pool import Block, Driver, SegmentPool

_PAGES = 1 << 32
"""Length of the address range: more than any device has, as addresses cost nothing."""


class ExpandablePool(SegmentPool):
    """Blocks of one pool in one address range that is mapped page by page."""

    def __init__(self, driver: Driver, settings: AllocatorSettings, *, small: bool) -> None:
        super().__init__(driver, settings, small=small)
        self.page = SMALL_SEGMENT if small else settings.large_segment
        self.least_rest, self.split_below = SMALLEST_BLOCK, float("inf")
        first = Block(self, 0, self.page * _PAGES, mapped=False)
        self.unmapped: list[tuple[int, Block]] = [(0, first)]
        """Address ranges without memory, lowest first; the last one has no end."""

    def _best(self, place: int) -> int:
        """Prefer the block that could grow least: the one before the open end is worth as much as the end can give."""
        last = len(self.cached) - 1
        while place < last and self._reach(place + 1) < self._reach(place):
            place += 1
        return place

    def _reach(self, place: int) -> int:
        size, _, block = self.cached[place]
        return size if block.next is None or block.next.mapped else size + block.next.size

    def grow(self, size: int) -> Block | None:
        """Map pages at the lowest address where `size` bytes fit, behind a free block if one lies there."""
        if not self.driver.allows(self.settings.segment_size(size)):
            return None
        block = self._room(size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            gap = block.next
            assert gap is not None and not gap.mapped
            if not self._map(gap, min(gap.size, size - block.size)):
                return None
            block = gap
        self._forget(block)
        return block

    def _room(self, size: int) -> Block:
        for _, gap in self.unmapped:
            start = gap if gap.previous is None or not gap.previous.free else gap.previous
            room, end = start.size, start.next
            while room < size and end is not None and end.free:
                room, end = room + end.size, end.next
            if room >= size:
                return start
        raise AssertionError("the open end holds everything")

    def _map(self, gap: Block, size: int) -> bool:
        """Give memory to the first `size` bytes of `gap`, whole pages; nothing happens if the driver has not enough."""
        size = -(-size // self.page) * self.page
        if not self.driver.take(size):
            return False
        self._forget(gap)
        if size < gap.size:
            rest = Block(self, gap.address + size, gap.size - size, mapped=False)
            rest.put_between(gap, gap.next)
            insort(self.unmapped, (rest.address, rest))
            gap.size = size
        gap.mapped = True
        self._merge_around(gap)
        self._cache(gap)
        return True

    def _forget(self, block: Block) -> None:
        if block.mapped:
            super()._forget(block)
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    @property
    def segments(self) -> int:
        """How many stretches of pages the pool holds: each of them ends before a gap."""
        return sum(gap.previous is not None for _, gap in self.unmapped)

    def release(self) -> None:
        """Return all pages to the driver that are wholly free."""
        for _, _, block in list(self.cached):
            self._unmap(block)

    def _unmap(self, block: Block) -> None:
        start = -(-block.address // self.page) * self.page
        end = (block.address + block.size) // self.page * self.page
        if start >= end:
            return
        self._forget(block)
        for address, stop in ((block.address, start), (end, block.address + block.size)):
            if address < stop:
                margin = Block(self, address, stop - address)
                margin.put_between(*((block.previous, block) if address < start else (block, block.next)))
                self._cache(margin)
        block.address, block.size, block.mapped = start, end - start, False
        self.driver.give_back(block.size)
        self._merge_around(block)
        insort(self.unmapped, (block.address, block))

    def release_oversize(self, size: int) -> bool:
        """Return nothing: there are no segments that could go one by one."""
        return False

    def collect(self, excess: int) -> None:
        """Return nothing: only segments age."""

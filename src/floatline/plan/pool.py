"""One pool of the caching allocator: segments from the driver, cut into blocks, kept when freed.

A request gets the smallest free block that holds it, of equal ones that at the lowest address. What is left over
becomes a free block of its own if it is worth keeping; freed neighbours of one segment merge. A block that is not cut
counts as allocated as a whole: `memory_allocated` can exceed what was asked for by up to 1 MiB a block.

`SegmentPool` takes a new segment for what nothing cached serves, and can return a segment only when all of it is free.
`ExpandablePool` owns one address range and maps pages at its end, so that old and new memory form one block; it can
return every page that is wholly free. Pages lie in the address range like blocks, free, in use or unmapped, in one
chain.

Not covered: streams (all requests are one stream's), private pools of CUDA graphs and of MemPool. Addresses of segments
grow in the order of their making; the real driver's may not, which matters for equally large free blocks only.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from floatline.plan.allocator_settings import LARGEST_SMALL, SMALL_SEGMENT, SMALLEST_BLOCK, AllocatorSettings

_ADDRESS_RANGE = 1 << 56
"""Address space of an expandable segment: more than any device has, as address space costs nothing."""


class Driver:
    """The memory that pools share: what they took, and how much they may.

    Args:
        capacity: Bytes that the driver has, None for no limit.
        allowed: Bytes that torch may take of it (`per_process_memory_fraction`), None for no limit of its own.
    """

    def __init__(self, capacity: int | None, allowed: int | None) -> None:
        self.capacity = float("inf") if capacity is None else capacity
        self.allowed = allowed
        self.reserved = 0
        self.peak = 0
        self.top = 0

    def take(self, size: int) -> bool:
        """Take `size` bytes of memory if they are there."""
        if self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak = max(self.peak, self.reserved)
        return True

    def give_back(self, size: int) -> None:
        """Return `size` bytes of memory."""
        self.reserved -= size

    def addresses(self, size: int) -> int:
        """Return the start of an address range that nobody has."""
        start = self.top
        self.top += size
        return start

    def allows(self, size: int) -> bool:
        """Say whether torch's own limit lets it ask the driver for `size` more bytes."""
        return self.allowed is None or self.reserved + size <= self.allowed


class Block:
    """A piece of a segment of `pool`; `previous` and `next` are its neighbours there."""

    __slots__ = ("address", "cached_at", "free", "mapped", "next", "pool", "previous", "size")

    def __init__(self, pool: SegmentPool, address: int, size: int, *, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.free = True
        self.mapped = mapped
        self.previous: Block | None = None
        self.next: Block | None = None
        self.cached_at = 0

    @property
    def whole(self) -> bool:
        """True where the block is all of its segment."""
        return self.previous is None and self.next is None

    def put_between(self, previous: Block | None, next: Block | None) -> None:
        self.previous, self.next = previous, next
        if previous is not None:
            previous.next = self
        if next is not None:
            next.previous = self


class SegmentPool:
    """Blocks of one pool, small or large, in segments of their own."""

    def __init__(self, driver: Driver, settings: AllocatorSettings, *, small: bool) -> None:
        self.driver = driver
        self.settings = settings
        self.oversize = settings.oversize
        self.least_rest = SMALLEST_BLOCK if small else LARGEST_SMALL + 1
        """Smallest remainder that is split off."""
        self.split_below = float("inf") if small else settings.oversize
        """Size of a request from which on its block stays whole."""
        self.cached: list[tuple[int, int, Block]] = []
        """Free blocks by size and address."""
        self.searches = 0
        self.taken = 0

    def find(self, size: int) -> Block | None:
        """Take the best cached block for `size` bytes out of the cache, None if there is none."""
        self.searches += 1
        place = self._best(bisect_left(self.cached, (size,)))
        if place == len(self.cached):
            return None
        found = self.cached[place][0]
        if size < self.oversize <= found or (size >= self.oversize and found >= size + self.settings.oversize_slack):
            return None
        return self.cached.pop(place)[2]

    def _best(self, place: int) -> int:
        """Return the place of the block to use, given that of the smallest one that fits."""
        return place

    def grow(self, size: int) -> Block | None:
        """Take a block for `size` bytes from the driver, None if it has not enough."""
        length = self.settings.segment_size(size)
        if not (self.driver.allows(length) and self.driver.take(length)):
            return None
        self.taken += 1
        return Block(self, self.driver.addresses(length), length)

    def use(self, block: Block, size: int) -> Block:
        """Hand out `block` for `size` bytes and keep what it has too much, if that is worth it."""
        rest = block.size - size
        if rest >= self.least_rest and size < self.split_below:
            remainder = Block(self, block.address + size, rest)
            remainder.put_between(block, block.next)
            block.size = size
            self._cache(remainder)
        block.free = False
        return block

    def put_back(self, block: Block) -> None:
        """Cache a block that is no longer used, merged with its free neighbours."""
        block.free = True
        self._merge_around(block)
        self._cache(block)

    def _merge_around(self, block: Block) -> None:
        for other in (block.previous, block.next):
            if other is not None and other.free and other.mapped == block.mapped:
                self._forget(other)
                block.size += other.size
                if other is block.previous:
                    block.address = other.address
                    block.put_between(other.previous, block.next)
                else:
                    block.put_between(block.previous, other.next)

    def _cache(self, block: Block) -> None:
        block.cached_at = self.searches
        insort(self.cached, (block.size, block.address, block))

    def _forget(self, block: Block) -> None:
        del self.cached[bisect_left(self.cached, (block.size, block.address))]

    @property
    def segments(self) -> int:
        """How many pieces of memory the pool holds."""
        return self.taken

    def release(self) -> None:
        """Return all cached segments to the driver that are wholly free."""
        for _, _, block in [entry for entry in self.cached if entry[2].whole]:
            self._return(block)

    def release_oversize(self, size: int) -> bool:
        """Return oversize blocks, no more than `size` bytes need; say whether they are enough.

        That is the smallest one that suffices, or else the largest ones until their sum does.
        """
        if self.oversize == float("inf"):
            return False
        need = max(size, self.oversize)
        place = bisect_left(self.cached, (need,))
        if place < len(self.cached):
            self._return(self.cached[place][2])
            return True
        while need > 0 and self.cached and self.cached[-1][0] >= self.oversize:
            need -= self.cached[-1][0]
            self._return(self.cached[-1][2])
        return need <= 0

    def collect(self, excess: int) -> None:
        """Return the segments that lay unused for longest, until `excess` bytes are back or none is left.

        Age is the number of requests since the block was freed. All of at least average age go at once.
        """
        idle = [entry[2] for entry in self.cached if entry[2].whole]
        while idle and excess > 0:
            average = sum(self.searches - block.cached_at for block in idle) / len(idle)
            old = [block for block in idle if self.searches - block.cached_at >= average]
            idle = [block for block in idle if self.searches - block.cached_at < average]
            for block in old:
                excess -= block.size
                self._return(block)

    def _return(self, block: Block) -> None:
        assert block.whole, "only a whole segment can be returned"
        self._forget(block)
        self.driver.give_back(block.size)
        self.taken -= 1


class ExpandablePool(SegmentPool):
    """Blocks of one pool in one address range that is mapped page by page."""

    def __init__(self, driver: Driver, settings: AllocatorSettings, *, small: bool) -> None:
        super().__init__(driver, settings, small=small)
        self.page = SMALL_SEGMENT if small else settings.large_segment
        self.least_rest, self.split_below = SMALLEST_BLOCK, float("inf")
        first = Block(self, 0, _ADDRESS_RANGE, mapped=False)
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
            room, block = 0, start
            while room < size and block is not None and block.free:
                room, block = room + block.size, block.next
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

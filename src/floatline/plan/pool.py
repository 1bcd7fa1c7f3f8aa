"""One pool of the caching allocator: segments from the driver, cut into blocks, kept when freed.

A request gets the smallest free block that holds it, of equal ones that at the lowest address. What is left over
becomes a free block of its own if it is worth keeping; freed neighbours of one segment merge. A block that is not cut
counts as allocated as a whole: `memory_allocated` can exceed what was asked for by up to 1 MiB a block.

What nothing cached serves gets a new segment, and a segment goes back to the driver only when all of it is free.

Not covered: streams (all requests are one stream's), private pools of CUDA graphs and of MemPool. Addresses of segments
grow in the order of their making; the real driver's may not, which matters for equally large free blocks only.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from floatline.plan.allocator_settings import LARGEST_SMALL, SMALLEST_BLOCK, AllocatorSettings


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
        self.split_below = self.oversize
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
        need = size
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

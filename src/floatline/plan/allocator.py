"""What CUDA's caching allocator would reserve: the rules of torch's allocator, replayed over a trace.

Tensors are not all that a GPU's memory holds: sizes are rounded up, memory comes in segments, and what lies between
live tensors can be too scattered to use. A run that needs 14 GB of tensors fails on a 15 GB card when that gap is 2 GB.
`simulate` replays births and deaths of storages with the allocator's own rules and says what would be allocated
(`torch.cuda.max_memory_allocated`), reserved (`max_memory_reserved`), and where a card of some capacity runs out.

When nothing cached serves a request, the driver is asked for memory. If it has none, first segments that are oversize
are returned to it (with `max_split_size_mb`), then all that is free, and each time it is asked again; then it is an
out-of-memory error, and the replay ends as the run would. See pool.py for segments and blocks, expandable.py
for pages, allocator_settings.py for the knobs.

Not covered: what others take from the driver (CUDA context, NCCL, a second process), which is to be taken off
`capacity`; memory that is held back because another stream used it (`record_stream`); the driver's own granularity,
which rounds segments up where `large_segment_size_mb` is odd.

Source: torch 2.13, the rules from c10/cuda/CUDACachingAllocator.cpp, the sizes from c10/core/AllocatorConfig.h.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from floatline.errors import ConfigError, TraceError
from floatline.plan.allocator_settings import LARGEST_SMALL, AllocatorSettings
from floatline.plan.expandable import ExpandablePool
from floatline.plan.pool import Block, Driver, SegmentPool

__all__ = ["AllocatorSettings", "Curve", "Replay", "simulate"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Bytes after each event that was replayed.

    Attributes:
        allocated: Bytes in blocks that are in use.
        reserved: Bytes taken from the driver.
    """

    allocated: array[int]
    reserved: array[int]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the allocator did with a trace. All sizes are bytes.

    Attributes:
        peak_allocated: Most bytes of blocks in use; `torch.cuda.max_memory_allocated`.
        peak_requested: Most bytes that were asked for at once, before any rounding.
        peak_reserved: Most bytes taken from the driver; `torch.cuda.max_memory_reserved`.
        end_allocated, end_reserved: The same after the last event.
        peak_index: The first event at which `peak_allocated` was reached; None where nothing was allocated.
        segments: Pieces of memory held at the end: segments, or stretches of mapped pages (as in
            `torch.cuda.memory_snapshot`).
        out_of_memory: The event that could not be served; the replay ends before it. None if all were.
        retries: Requests for which everything cached was returned to the driver; torch's `num_alloc_retries`.
        curve: Allocated and reserved bytes over time, if asked for.
    """

    peak_allocated: int
    peak_requested: int
    peak_reserved: int
    end_allocated: int
    end_reserved: int
    peak_index: int | None
    segments: int
    out_of_memory: int | None
    retries: int
    curve: Curve | None = None


def simulate(
    events: Iterable[tuple[int, int]],
    settings: AllocatorSettings = AllocatorSettings(),  # noqa: B008 - frozen
    capacity: int | None = None,
    *,
    device_memory: int | None = None,
    keep_curve: bool = False,
) -> Replay:
    """Replay allocations with the rules of CUDA's caching allocator.

    Args:
        events: Pairs (storage, bytes): more than 0 allocates that many bytes under that name, less than 0 frees them,
            0 is passed over (an empty tensor takes no memory). A freed name may be used again.
        settings: The allocator's knobs.
        capacity: Bytes that the driver can give to this process; None for no limit.
        device_memory: Bytes of the device in all, of which `per_process_memory_fraction` is a share; None: `capacity`.
        keep_curve: Keep allocated and reserved bytes after every event.

    Returns:
        Peaks, ends, and the event at which memory ran out.

    Raises:
        TraceError: A storage is allocated twice, or one is freed that is not there.
        ConfigError: A negative capacity.

    >>> simulate([(0, 3_000_000), (1, 700), (0, -1)]).peak_reserved // 2**20
    22
    """
    for name, size in (("capacity", capacity), ("device_memory", device_memory)):
        if size is not None and size < 0:
            raise ConfigError(f"{name} is {size} bytes; allowed: 0 or more, or None for no limit")
    allocator = _Allocator(settings, capacity, capacity if device_memory is None else device_memory)
    curve = Curve(allocated=array("q"), reserved=array("q")) if keep_curve else None
    for index, (storage, change) in enumerate(events):
        if change > 0:
            if not allocator.allocate(index, storage, change):
                return allocator.replay(index, curve)
        elif change < 0:
            allocator.free(index, storage)
        if curve is not None:
            curve.allocated.append(allocator.allocated)
            curve.reserved.append(allocator.driver.reserved)
    return allocator.replay(None, curve)


class _Allocator:
    """Both pools, and the order in which memory is sought."""

    def __init__(self, settings: AllocatorSettings, capacity: int | None, device_memory: int | None) -> None:
        fraction = settings.per_process_memory_fraction
        allowed = int(fraction * device_memory) if fraction < 1 and device_memory is not None else None
        self.collect_above: float = float("inf")
        if allowed is not None and settings.garbage_collection_threshold > 0:
            self.collect_above = int(settings.garbage_collection_threshold * allowed)
        self.driver = Driver(capacity, allowed)
        pool = ExpandablePool if settings.expandable_segments else SegmentPool
        self.small = pool(self.driver, settings, small=True)
        self.large = pool(self.driver, settings, small=False)
        self.round_size = settings.round_size
        self.live: dict[int, tuple[Block, int]] = {}
        self.allocated = self.requested = self.peak_allocated = self.peak_requested = self.retries = 0
        self.peak_index: int | None = None

    def allocate(self, index: int, storage: int, requested: int) -> bool:
        if storage in self.live:
            raise TraceError(f"event {index} allocates storage {storage!r}, which is already allocated")
        size = self.round_size(requested)
        pool = self.small if size <= LARGEST_SMALL else self.large
        block = pool.find(size) or self._from_driver(pool, size)
        if block is None:
            return False
        self.live[storage] = pool.use(block, size), requested
        self.requested += requested
        self.allocated += block.size
        if self.requested > self.peak_requested:
            self.peak_requested = self.requested
        if self.allocated > self.peak_allocated:
            self.peak_allocated, self.peak_index = self.allocated, index
        return True

    def _from_driver(self, pool: SegmentPool, size: int) -> Block | None:
        if self.driver.reserved > self.collect_above:
            self.large.collect(int(self.driver.reserved - self.collect_above))
        block = pool.grow(size)
        if block is None and pool.release_oversize(size):
            block = pool.grow(size)
        if block is None:
            self.retries += 1
            self.large.release()
            self.small.release()
            block = pool.grow(size)
        return block

    def free(self, index: int, storage: int) -> None:
        if storage not in self.live:
            raise TraceError(f"event {index} frees storage {storage!r}, which is not allocated")
        block, requested = self.live.pop(storage)
        self.requested -= requested
        self.allocated -= block.size
        block.pool.put_back(block)

    def replay(self, out_of_memory: int | None, curve: Curve | None) -> Replay:
        return Replay(
            peak_allocated=self.peak_allocated,
            peak_requested=self.peak_requested,
            peak_reserved=self.driver.peak,
            end_allocated=self.allocated,
            end_reserved=self.driver.reserved,
            peak_index=self.peak_index,
            segments=self.small.segments + self.large.segments,
            out_of_memory=out_of_memory,
            retries=self.retries,
            curve=curve,
        )

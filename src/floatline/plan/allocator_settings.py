"""The knobs of CUDA's caching allocator, as `PYTORCH_ALLOC_CONF` (older: `PYTORCH_CUDA_ALLOC_CONF`) spells them.

    expandable_segments           one address range a pool that grows page by page, instead of one segment a request
    large_segment_size_mb         what a request of 1 to 10 MiB takes from the driver (20)
    max_split_size_mb             requests from this size on get blocks that are not split, smaller ones none so large
    max_non_split_rounding_mb     how much larger than a request an unsplit block may be (large_segment_size_mb)
    per_process_memory_fraction   share of the device's memory that may be taken (1.0: whatever the driver gives)
    garbage_collection_threshold  share of that share from which on segments that lay idle longest are returned; torch
                                  looks at it only where a fraction below 1 is set
    roundup_power2_divisions      sizes are rounded up to the next of so many steps between two powers of two

The bounds are those of torch's own parser; "mb" means MiB there. Keys of that variable that say nothing about
device memory (pinned host memory, locks) are accepted and left out.

Not covered: `backend:cudaMallocAsync`, an allocator of its own inside the driver. It is refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from floatline.errors import ConfigError, did_you_mean

KIB = 1024
MIB = 1024 * KIB
SMALLEST_BLOCK = 512
"""Every size is a multiple of this."""
LARGEST_SMALL = MIB
"""Largest request that the small pool serves."""
SMALL_SEGMENT = 2 * MIB
"""What the small pool takes from the driver at a time; its page with expandable segments."""
LARGE_FROM = 10 * MIB
"""Requests from here on get a segment of their own ..."""
LARGE_STEP = 2 * MIB
"""... whose size is a multiple of this."""

_INTERVALS = 16
"""Round-up steps can differ by power of two, from 1 MiB to 32 GiB and above."""
_HARMLESS = {"backend", "release_lock_on_cudamalloc", "release_lock_on_hipmalloc", "graph_capture_record_stream_reuse",
             "throw_on_cudamalloc_oom", "pinned_use_cuda_host_register", "pinned_use_hip_host_register",
             "pinned_reserve_segment_size_mb", "pinned_num_register_threads", "pinned_free_catch_all",
             "pinned_use_background_threads", "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """Settings of the caching allocator; the defaults are torch's.

    Args:
        expandable_segments: Grow one address range a pool instead of taking segments.
        large_segment_size_mb: MiB that a request of 1 to 10 MiB takes; more than 10.
        max_split_size_mb: MiB from which on blocks stay whole; at least `large_segment_size_mb`. None: no limit.
        max_non_split_rounding_mb: MiB that an unsplit block may be too large. None: `large_segment_size_mb`.
        per_process_memory_fraction: Share of the device's memory that may be taken, above 0, up to 1.
        garbage_collection_threshold: Share of the memory so allowed, between 0 and 1; 0 switches it off.
        roundup_power2_divisions: Steps between two powers of two, a power of two, 0 or 1 for none; one number for all
            sizes, or 16 for sizes below 2 MiB, 4 MiB, 8 MiB, ... and the rest.

    Raises:
        ConfigError: A value that torch would refuse.

    >>> AllocatorSettings.parse("expandable_segments:True, max_split_size_mb:128")
    AllocatorSettings(expandable_segments=True, large_segment_size_mb=20, max_split_size_mb=128, \
max_non_split_rounding_mb=None, per_process_memory_fraction=1.0, garbage_collection_threshold=0.0, \
roundup_power2_divisions=0)
    >>> str(AllocatorSettings(expandable_segments=True, max_split_size_mb=64))
    'expandable_segments:True,max_split_size_mb:64'
    """

    expandable_segments: bool = False
    large_segment_size_mb: int = 20
    max_split_size_mb: int | None = None
    max_non_split_rounding_mb: int | None = None
    per_process_memory_fraction: float = 1.0
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        _need(self.large_segment_size_mb > 10, "large_segment_size_mb", self.large_segment_size_mb, "above 10")
        for name in ("max_split_size_mb", "max_non_split_rounding_mb"):
            value = getattr(self, name)
            least = self.large_segment_size_mb
            _need(value is None or value >= least, name, value, f"{least} (large_segment_size_mb) or more")
        fraction, threshold = self.per_process_memory_fraction, self.garbage_collection_threshold
        _need(0 < fraction <= 1, "per_process_memory_fraction", fraction, "above 0, up to 1")
        _need(0 <= threshold < 1, "garbage_collection_threshold", threshold, "above 0 and below 1, or 0 for off")
        steps = self.roundup_power2_divisions
        each = (steps,) if isinstance(steps, int) else steps
        good = all(n >= 0 and n & (n - 1) == 0 for n in each) and (isinstance(steps, int) or len(each) == _INTERVALS)
        _need(good, "roundup_power2_divisions", steps, f"a power of two or 0, or {_INTERVALS} of them")

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Read the text of the environment variable. As in torch, the last of two equal keys counts.

        Raises:
            ConfigError: An unknown key, or a value that torch would refuse.
        """
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in _pairs(text):
            if key in names:
                values[key] = _READERS[key](key, value)
            elif key == "backend" and value != "native":
                raise ConfigError(f"backend:{value} is not simulated", hint="plan with backend:native, torch's default")
            elif key not in _HARMLESS:
                raise ConfigError(f"unknown allocator setting {key!r}", hint=did_you_mean(key, names))
        return cls(**values)

    def __str__(self) -> str:
        """Return the text that parses back to these settings; empty where all are torch's defaults."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(f"{name}:{_value_text(value)}" for name, value in changed)

    @property
    def large_segment(self) -> int:
        """Bytes that a request of 1 to 10 MiB takes from the driver."""
        return self.large_segment_size_mb * MIB

    @property
    def oversize(self) -> float:
        """Bytes from which on a block is oversize: never split; infinite without `max_split_size_mb`."""
        return float("inf") if self.max_split_size_mb is None else self.max_split_size_mb * MIB

    @property
    def oversize_slack(self) -> int:
        """Bytes by which an oversize block may exceed the request that gets it."""
        return (self.max_non_split_rounding_mb or self.large_segment_size_mb) * MIB

    def round_size(self, size: int) -> int:
        """Return the bytes that a request of `size` bytes is rounded up to.

        >>> AllocatorSettings().round_size(513), AllocatorSettings(roundup_power2_divisions=4).round_size(1200 * 1024)
        (1024, 1310720)
        """
        steps = self._steps(size)
        if steps > 1 and size > SMALLEST_BLOCK * steps:
            step = (1 << (size.bit_length() - 1)) // steps
            return -(-size // step) * step
        return max(SMALLEST_BLOCK, -(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK)

    def _steps(self, size: int) -> int:
        if isinstance(self.roundup_power2_divisions, int):
            return self.roundup_power2_divisions
        return self.roundup_power2_divisions[min(max(size // MIB, 1).bit_length(), _INTERVALS) - 1]

    def segment_size(self, size: int) -> int:
        """Return the bytes that a request of `size` (rounded) takes from the driver when nothing cached serves it.

        >>> [AllocatorSettings().segment_size(n * MIB) // MIB for n in (1, 2, 10, 11)]
        [2, 20, 10, 12]
        """
        if size <= LARGEST_SMALL:
            return SMALL_SEGMENT
        return self.large_segment if size < LARGE_FROM else -(-size // LARGE_STEP) * LARGE_STEP


def _need(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"allocator setting {name} = {value!r}; allowed: {allowed}")


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Split "key:value,key:[a:b,c:d]" at the commas outside of brackets."""
    depth, item = 0, ""
    for char in "".join(text.split()) + ",":
        depth += (char == "[") - (char == "]")
        if char != "," or depth > 0:
            item += char
        elif item:
            key, colon, value = item.partition(":")
            if not colon or not value or not key:
                raise ConfigError(f"allocator setting {item!r} in {text!r}", hint="write key:value, commas between")
            yield key, value
            item = ""
    if depth:
        raise ConfigError(f"a bracket does not close in the allocator settings {text!r}", hint="write key:[1:2,>:4]")


def _bool(key: str, value: str) -> bool:
    _need(value in ("True", "False"), key, value, "True or False")
    return value == "True"


def _whole(key: str, value: str) -> int:
    _need(value.isdecimal(), key, value, "a whole number")
    return int(value)


def _share(key: str, value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = float("nan")
    _need(0 < share <= 1, key, value, "a number above 0, up to 1")
    return share


def _divisions(key: str, value: str) -> int | tuple[int, ...]:
    """Read one number or "[256:1,512:2,>:4]": MiB (a power of two) and its steps; ">" is what lies above the last."""
    if not value.startswith("["):
        _need(value != "0", key, value, "a power of two")
        return _whole(key, value)
    steps, last, first = [0] * _INTERVALS, 0, True
    for item in filter(None, value[1:-1].split(",")):
        bound, _, count = item.partition(":")
        number = _whole(key, count)
        if bound == ">":
            steps[last + 1 :] = [number] * (_INTERVALS - last - 1)
            continue
        size = _whole(key, bound)
        _need(size > 0 and size & (size - 1) == 0, key, value, "bounds that are powers of two")
        last = min(size.bit_length(), _INTERVALS) - 1
        if first:  # smaller sizes are treated like the smallest that is named
            steps[:last] = [number] * last
            first = False
        steps[last] = number
    return tuple(steps)


def _value_text(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(f"{1 << index}:{count}" for index, count in enumerate(value)) + "]"
    return str(value)


_READERS: dict[str, Any] = {
    "expandable_segments": _bool,
    "large_segment_size_mb": _whole,
    "max_split_size_mb": _whole,
    "max_non_split_rounding_mb": _whole,
    "per_process_memory_fraction": _share,
    "garbage_collection_threshold": _share,
    "roundup_power2_divisions": _divisions,
}

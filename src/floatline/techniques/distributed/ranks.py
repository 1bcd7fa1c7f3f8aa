"""The processes that train one model together, and an object for training alone.

How a group of ranks comes to be is groups.py's matter. Everything that decides what happens next (is this update good,
stop now, which checkpoint) is agreed on, so that every rank makes the same collectives in the same order: a rank that
skips one alone leaves the others waiting.

Sums are taken in the order of the ranks and on every rank alike, so all of them see the same bits.

What happens when a rank dies: the others' next collective over gloo fails at once, and `watching` turns that into a
`RankLostError` that names who is gone. Over NCCL a collective that waits on the device is not interrupted; there the
launcher ends the other ranks, or NCCL's own watchdog does, without our message.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from floatline.errors import FloatlineError, RankLostError

T = TypeVar("T")
_SECONDS_TO_DIE = 2.0
_CONNECTION_FAULTS = ("connection closed by peer", "connection reset", "connection refused", "broken pipe", "gloo",
                      "nccl", "socket", "timed out")  # fmt: skip


class OneRank:
    """The null object: this process trains alone.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
    """

    rank = 0
    size = 1

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """Return every rank's `value`, stacked in the order of the ranks."""
        return value.detach()[None]

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return `value` summed over all ranks."""
        return value

    def tell(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return every rank's `numbers` (equally many, whole ones up to 2^53 exact), in the order of the ranks."""
        return [[float(number) for number in numbers]]

    def any(self, flag: bool) -> bool:
        """Say whether `flag` is set on any rank."""
        return any(told for (told,) in self.tell([flag]))

    def collect(self, value: T) -> list[T]:
        """Return every rank's `value`, a picklable object."""
        return [value]

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone; every rank gets its result, or its error."""
        return action()

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; where one fails, all of them raise its error."""
        return action()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Turn a broken connection into a RankLostError."""
        yield


class RankGroup(OneRank):
    """The ranks of a process group.

    Args:
        group: A torch process group whose members hold shards of one model and see different data.

    Attributes:
        members: Host and process id of each rank, once `introduce` has run.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.members: list[tuple[str, int]] = []
        kinds = {device.type for device in group._device_types}  # host messages go over gloo where it is there
        self.device = torch.device("cpu" if "cpu" in kinds else "cuda")

    def introduce(self) -> RankGroup:
        """Let the ranks tell each other who they are, so that a lost one can be named."""
        self.members = self.collect((socket.gethostname(), os.getpid()))
        return self

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        mine = value.detach().contiguous()
        if mine.device.type == "cpu":
            mine = mine.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.stack(parts).to(value.device)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        return self.gather(value).sum(0)

    def tell(self, numbers: Sequence[float]) -> list[list[float]]:
        told: list[list[float]] = self.gather(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return told

    def collect(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def on_first(self, action: Callable[[], T]) -> T:
        result, error = _attempt(action) if self.rank == 0 else (None, None)
        message: list[Any] = [(result, _portable(error))]
        dist.broadcast_object_list(message, dist.get_global_rank(self.group, 0), self.group, device=self.device)
        if self.rank != 0:
            result, error = message[0]
        if error is not None:
            raise _as_told(error, self.rank == 0)
        return result  # type: ignore[return-value]

    def together(self, action: Callable[[], T]) -> T:
        result, error = _attempt(action)
        errors = self.collect(_portable(error))
        first = next((rank for rank, other in enumerate(errors) if other is not None), None)
        if first == self.rank and error is not None:
            raise error
        if first is not None and (other := errors[first]) is not None:
            raise _as_told(other, False)
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except FloatlineError:
            raise
        except RuntimeError as error:
            if self.size == 1 or not is_connection_fault(error):
                raise
            raise self._lost() from error

    def _lost(self) -> RankLostError:
        gone = self._gone()
        who = " and ".join(f"rank {rank} (process {self.members[rank][1]})" for rank in gone) or "another rank"
        return RankLostError(
            f"{who} of {self.size} is gone, so rank {self.rank} cannot go on",
            hint="run the same command again: it goes on from the newest checkpoint; fewer ranks are fine",
        )

    def _gone(self) -> list[int]:
        """Return the ranks of this host whose process has ended; a dying one gets a moment to be dead."""
        here = socket.gethostname()
        mates = [(rank, pid) for rank, (host, pid) in enumerate(self.members) if host == here and rank != self.rank]
        end = time.monotonic() + _SECONDS_TO_DIE
        while mates and time.monotonic() < end:
            gone = [rank for rank, pid in mates if not _is_running(pid)]
            if gone:
                return gone
            time.sleep(0.02)
        return []


class PretendedRanks(RankGroup):
    """Ranks that `fake_ranks` pretends: all of them say what this one says, and nothing is sent."""

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return torch.stack([value.detach()] * self.size)

    def tell(self, numbers: Sequence[float]) -> list[list[float]]:
        return [[float(number) for number in numbers] for _ in range(self.size)]

    def collect(self, value: T) -> list[T]:
        return [value] * self.size

    def on_first(self, action: Callable[[], T]) -> T:
        return action()

    def together(self, action: Callable[[], T]) -> T:
        return action()


def _attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """Return an error that can be sent to other ranks."""
    return error if error is None or isinstance(error, FloatlineError) else RuntimeError(f"{error!r} on another rank")


def _as_told(error: Exception, mine: bool) -> Exception:
    """Mark an error that another rank raises and shows too, so that a user reads it once."""
    if isinstance(error, FloatlineError):
        error.told = not mine
    return error


def is_connection_fault(error: BaseException) -> bool:
    """Say whether an error of a collective means that a rank cannot be reached."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(fault in text for fault in _CONNECTION_FAULTS)


def _is_running(pid: int) -> bool:
    """Say whether a process of this host runs; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # no /proc here, or another user's process
        return True

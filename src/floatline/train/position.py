"""Where in the data a run is: a rollback rewinds it, and a batch that was at fault is left out when met again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any


class Position:
    """Counts the batches that a loader hands out.

    Args:
        loader: With `state_dict` and `load_state_dict`.
        kept: What `kept` returned, of a checkpoint.

    Attributes:
        at: Batches handed out so far, those left out included.
        moved: It was put back: the iterator over the loader must be made anew.
    """

    def __init__(self, loader: Any, kept: dict[str, Any] | None = None) -> None:
        self.at = 0
        self.moved = False
        self._loader = loader
        self._left_out: set[int] = set()
        self._recent: deque[int] = deque(maxlen=2)  # the last batches, by number
        if kept is not None:
            self.at = kept["at"]
            self._left_out = set(kept["left_out"])

    def counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches but for those that are left out."""
        self.moved = False
        for batch in batches:
            self.at += 1
            if self.at not in self._left_out:
                self._recent.append(self.at)
                yield batch

    def leave_out(self, behind: int) -> None:
        """Leave out a batch when it comes again.

        Args:
            behind: 0 for the one that was handed out last, 1 for the one before it: on CUDA a verdict comes late.
        """
        self._left_out.add(self._recent[-1 - behind])

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; the loader's own state is beside it."""
        return {"at": self.at, "left_out": sorted(self._left_out)}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, for a snapshot."""
        return {"at": self.at, "loader": self._loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a position."""
        self._loader.load_state_dict(state["loader"])
        self.at = state["at"]
        self.moved = True

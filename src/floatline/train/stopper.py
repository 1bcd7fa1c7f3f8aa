"""Ctrl-C and SIGTERM: in the middle of training they wait for a checkpoint, elsewhere they end the run at once.

Either way the run directory says how it ended, and the same command goes on. A second signal does not wait. Signals
reach the ranks of a run at different updates, or only some of them; the loop asks all ranks whether one was asked to
stop, and all stop at the same update.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from floatline.errors import RankLostError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user or the system asked the run to end; a checkpoint was written first."""


class Stopper:
    """Handles the two signals while it is active (in the main thread; elsewhere it does nothing).

    Attributes:
        asked: True once a signal came that is to be obeyed after the next checkpoint.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deferring = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the signals back. A process that has lost a rank is ending and ignores them, so that it can say so."""
        lost = kind is not None and issubclass(kind, RankLostError)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if lost else handler)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """While active a signal sets `asked` instead of raising.

        An error on its way out keeps it active: how the run ended is written down before a signal is obeyed. (When one
        rank dies, torchrun sends the others a SIGTERM just as they notice.)
        """
        self._deferring = True
        yield
        self._deferring = False

    def _handle(self, number: int, frame: Any) -> None:
        if self._deferring and not self.asked:
            self.asked = True
        else:
            raise KeyboardInterrupt

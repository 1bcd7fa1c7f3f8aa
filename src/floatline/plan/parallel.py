"""Several trials at once: helper processes work on what is asked next while this one traces.

A trace is Python all the way, so a second core helps only through a second process. `Helpers` starts processes that
load the same model (helper.py) and lets them make estimates that will be asked for, or may be:

    foresee(*trials)      what may come next, likeliest first; takes the place of what was foreseen before
    prepare(*trials)      what will be asked for in the end; done when nothing is foreseen
    estimate(trial, make) the estimate: a helper's where one has it or is at it, else `make()`, here

What was foreseen and is never asked for is dropped. A helper makes the same estimate as this process, to the byte, so
a plan does not depend on how many there are; without room for one (room.py) or on the first trouble with one (it dies,
it cannot load the model, it sends something else) the work is done here. `ALONE` is the same thing without helpers.

Helpers start when a model has many layers or a trial took longer than a second: a small model is planned before a
process has loaded torch.
Not covered: workloads that are Python objects (`fl.plan(work)`) or come from a user's function, which should not run
more often than the user thinks; CPUs as targets, whose kernels take buffers by the number of threads.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from floatline.errors import FloatlineError
from floatline.plan.estimate import Estimate
from floatline.plan.trial import Trial

T = TypeVar("T")
Piece = Generator[tuple[Trial, ...], Estimate, T]
"""Work that yields a trial it needs with others it may need next, is sent the estimate, and returns its answer."""
SLOW = 1.0
"""Seconds of a trial from which helpers are worth their start, which takes about five."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a helper came to: an estimate, an error of ours, or neither: then the asking process sees for itself."""

    estimate: Estimate | None = None
    error: FloatlineError | None = None


_NONE = Outcome()


class Alone:
    """No helpers: each estimate is made when it is asked for."""

    count = 0

    def start(self) -> None:
        """Start them, for it will take long; they start by themselves when a trial has taken long."""

    def foresee(self, *trials: Trial) -> None:
        """Say what may be asked for next, likeliest first."""

    def prepare(self, *trials: Trial) -> None:
        """Say what will be asked for in the end."""

    def first(self, trials: Sequence[Trial]) -> int:
        """Return the index of the trial to ask for first."""
        return 0

    def estimate(self, trial: Trial, make: Callable[[], Estimate]) -> Estimate:
        """Return the estimate of a trial; `make` makes it in this process."""
        return make()

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *error: object) -> None:
        """End the helpers, whatever they are at."""


ALONE = Alone()


class Helpers(Alone):
    """Processes that make estimates of one source. Use as a context; none is left afterwards.

    Args:
        loading: Arguments of `load_source`: text, shape, task.
        count: How many processes at most.
        slow: Seconds of a trial from which they are started.
    """

    def __init__(self, loading: tuple[Any, ...], count: int, *, slow: float = SLOW) -> None:
        self.loading, self.count, self.slow = loading, count, slow
        self._changed = threading.Condition()
        self._foreseen: list[Trial] = []
        self._prepared: list[Trial] = []
        self._outcomes: dict[Trial, Outcome | None] = {}  # None while a helper is at it
        self._processes: list[subprocess.Popen[bytes]] = []
        self._started = self._closed = False

    def foresee(self, *trials: Trial) -> None:
        with self._changed:
            self._foreseen = [trial for trial in dict.fromkeys(trials) if trial not in self._outcomes]
            self._changed.notify_all()

    def prepare(self, *trials: Trial) -> None:
        with self._changed:
            self._prepared += [trial for trial in trials if trial not in self._outcomes]
            self._changed.notify_all()

    def first(self, trials: Sequence[Trial]) -> int:
        """One that a helper has, else one that none is at, else the first that any of them will have."""
        with self._changed:
            while True:
                rank = [1 if trial not in self._outcomes else 2 if self._outcomes[trial] is None else 0
                        for trial in trials]  # fmt: skip
                if min(rank) < 2:
                    return rank.index(min(rank))
                self._changed.wait()

    def estimate(self, trial: Trial, make: Callable[[], Estimate]) -> Estimate:
        with self._changed:
            for waiting in (self._foreseen, self._prepared):
                if trial in waiting:
                    waiting.remove(trial)
            if trial in self._outcomes and self._outcomes[trial] is None:
                del self._foreseen[:1]  # this process goes on with it, while helpers do what comes after
            self._changed.wait_for(lambda: self._outcomes.get(trial, _NONE) is not None)
            outcome = self._outcomes.get(trial) or _NONE
        if outcome.error is not None:
            raise outcome.error
        return outcome.estimate or self._here(make)

    def _here(self, make: Callable[[], Estimate]) -> Estimate:
        begun = time.monotonic()
        try:
            return make()
        finally:
            if time.monotonic() - begun >= self.slow:
                self.start()

    def start(self) -> None:
        more = 0 if self._started else self.count
        self._started = True
        for number in range(more):
            threading.Thread(target=self._serve, name=f"floatline-helper-{number}", daemon=True).start()

    def _serve(self) -> None:
        """Run one helper until the end, its own or that of the work."""
        trial = None
        try:
            process = self._launch()
            _send(process, self.loading)
            _receive(process)  # loaded
            while (trial := self._next()) is not None:
                _send(process, trial)
                outcome = _receive(process)
                self._settle(trial, outcome if isinstance(outcome, Outcome) else _NONE)
                trial = None
        except Exception:  # whatever became of the helper, this process can do its work
            if trial is not None:
                self._settle(trial, _NONE)

    def _launch(self) -> subprocess.Popen[bytes]:
        with self._changed:
            if self._closed:
                raise EOFError
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "floatline.plan.helper"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment(),
            )  # fmt: skip
            self._processes.append(process)
            return process

    def _next(self) -> Trial | None:
        """Return what a helper does next, waiting for something to do; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._foreseen or self._prepared)
            if self._closed:
                return None
            trial = (self._foreseen or self._prepared).pop(0)
            self._outcomes[trial] = None
            for waiting in (self._foreseen, self._prepared):
                if trial in waiting:
                    waiting.remove(trial)
            return trial

    def _settle(self, trial: Trial, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes[trial] = outcome
            self._changed.notify_all()

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._processes:
            process.kill()  # what it is at is of no use to anybody
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # something was left unsent in it
                    assert pipe is not None
                    pipe.close()


def _send(process: subprocess.Popen[bytes], value: object) -> None:
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(value))
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    return pickle.load(process.stdout)  # from our own child


def _environment() -> dict[str, str]:
    """One thread each, as set before torch is loaded; modules are found where this process finds them."""
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def together(pieces: Sequence[Piece[T]], ask: Callable[[Trial], Estimate], helpers: Alone = ALONE) -> list[T]:
    """Run pieces of work that do not depend on each other; without helpers one after the other.

    Args:
        pieces: Generators; an error that a trial raises is raised in them where they asked for it.
        ask: Trial -> its estimate, `helpers` behind it.
        helpers: Who works on the trials of the other pieces meanwhile.

    Returns:
        What each piece returned, in their order.
    """
    answers: dict[int, T] = {}
    wanted: dict[int, tuple[Trial, ...]] = {}

    def go_on(number: int, step: Callable[[], tuple[Trial, ...]]) -> None:
        try:
            wanted[number] = step()
        except StopIteration as end:
            wanted.pop(number, None)
            answers[number] = end.value

    for number, piece in enumerate(pieces):
        go_on(number, partial(next, piece))
    while wanted:
        number = list(wanted)[helpers.first([needed for needed, *_ in wanted.values()])]
        trial = wanted[number][0]
        others = [needed for needed, *_ in wanted.values() if needed != trial]
        helpers.foresee(*others, *(likely for _, *maybe in wanted.values() for likely in maybe))
        try:
            found = ask(trial)
        except FloatlineError as error:
            go_on(number, partial(pieces[number].throw, error))
        else:
            go_on(number, partial(pieces[number].send, found))
    return [answers[number] for number in range(len(pieces))]

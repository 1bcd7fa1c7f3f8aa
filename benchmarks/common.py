"""What every benchmark here shares: facts about the machine, tables, JSON results, and interleaved timing.

Interleaving. Contestants are timed in turns, not one after the other, so that a machine that gets slower or faster
meanwhile does so for all. Each contestant is a process of its own: a trainer that owns its loop cannot be stepped from
outside, and none of them changes another one's imports, allocator or threads. Between its turns a process is frozen
(SIGSTOP), background threads included, so that what runs beside one contestant's steps is never another contestant.

    round 1:  A A A A | B B B B | C C C C
    round 2:  B B B B | C C C C | A A A A
    ...

Within a turn the contestant calls `Clock.tick()` once a step, and the time between two calls is one step. Ratios are
taken within a round, between the medians of two turns; their spread over rounds says how far to trust them. Where
memory came to lie can make one process a per cent faster than its twin, so all are started afresh a few times.

Memory. By default glibc gives large freed tensors back to the system and fetches them again in the next step: about
1600 page faults a step on the model of step_overhead.py, a few per cent of its time, and by chance of the heap's layout
more in one process than in its twin. So contestants run with an allocator that keeps what it has (no faults at all).

Not covered: GPUs (a frozen process would leave kernels running), Windows (no SIGSTOP).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------------------------------------------------------------
# Facts


def machine() -> dict[str, Any]:
    """Return processor, cores and memory, and how busy the machine was with other things (load average, 1 minute)."""
    from floatline.hardware.detect import resolve

    cpu = resolve("cpu")
    return {
        "cpu": cpu.name,
        "cores": os.cpu_count(),
        "memory_bytes": cpu.memory,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }


def command() -> str:
    """Return the command line as a user would type it."""
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# Output


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `values` lie, between neighbours linearly.

    >>> quantile([1.0, 2.0, 3.0], 0.25)
    1.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns, the first to the left and the others to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        print("  ".join(cells).rstrip())


def report(rows: list[dict[str, Any]], packages: Sequence[str], path: Path | None, **more: Any) -> None:
    """Print what the numbers were measured with, and write them to `path` as JSON where one is given."""
    from floatline.train.manifest import versions

    facts = {
        "command": command(),
        "versions": versions(packages),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        **more,
    }
    print()
    print("versions  " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    print("machine   " + machine_line(facts["machine"]))
    print("command   " + facts["command"])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def machine_line(facts: dict[str, Any]) -> str:
    """Return `machine()` as one line."""
    memory = facts["memory_bytes"] / 2**30
    return f"{facts['cpu']}, {facts['cores']} cores, {memory:.0f} GiB, {facts['system']}, load {facts['load']}"


def progress(text: str) -> None:
    """Show where a long benchmark is, on stderr; "" clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Interleaved timing

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
"""Environment in which glibc never gives memory back; see the top."""


def keep_memory() -> None:
    """Start this script again in that environment, unless it runs in it already."""
    if any(os.environ.get(key) != value for key, value in KEEP_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})


@dataclass(frozen=True)
class Turn:
    """One contestant's turn.

    Attributes:
        wall: Seconds of each step.
        cpu: Processor seconds of each step, all threads; other programs do not lengthen them.
        check: What the contestant's `Clock.check` returned, a number that should be alike for all.
    """

    wall: list[float]
    cpu: list[float]
    check: float | None


class Clock:
    """A contestant's side of the measurement: times its steps, and freezes it between turns.

    Args:
        steps: Steps a turn that count.
        discard: Steps at the start of a turn that do not: caches are cold, rate limits by the clock have run out.
        hand_over: Takes a finished turn; returns when the next one begins.

    Attributes:
        check: Called at the end of a turn, outside the timing.
    """

    def __init__(self, steps: int, discard: int, hand_over: Callable[[Turn], None]) -> None:
        self.steps = steps
        self.discard = discard
        self.hand_over = hand_over
        self.check: Callable[[], float] | None = None
        self._marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """Note the end of a step and the beginning of the next."""
        self._mark()
        if len(self._marks) > self.discard + self.steps:
            self._end_turn()
            self._mark()

    def _mark(self) -> None:
        self._marks.append((time.perf_counter(), time.process_time()))

    def _end_turn(self) -> None:
        marks = self._marks[self.discard :]
        wall, cpu = ([after - before for before, after in pairwise(side)] for side in zip(*marks, strict=True))
        self._marks = []
        self.hand_over(Turn(wall, cpu, self.check() if self.check else None))

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with a tick at each call."""

        def watched(*args: Any) -> Any:
            self.tick()
            return function(*args)

        return watched


Contestant = Callable[[Clock, Path], None]
"""Trains until a tick raises SystemExit, ticking once a step; the folder is for its logs."""


@dataclass
class _Racer:
    """A contestant's process, seen from outside."""

    name: str
    process: Any
    connection: Connection
    log: Path

    def turn(self, *, first: bool = False) -> Turn:
        """Let it run until it has finished a turn; returns that."""
        if not first:
            os.kill(self.process.pid, signal.SIGCONT)
        try:
            turn: Turn = self.connection.recv()
        except EOFError:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"{self.name} ended early; the end of its output:\n{tail}") from None
        os.waitpid(self.process.pid, os.WUNTRACED)
        return turn

    def end(self) -> None:
        """Let it clean up and exit; kill it if that takes long."""
        if self.process.is_alive():
            self.connection.send("end")
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.join(20)
        self.process.kill()
        self.process.join()


def _serve(contestant: Contestant, steps: int, discard: int, connection: Connection, folder: Path) -> None:
    """Run a contestant in this (fresh) process, its output going to a file."""
    log = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def hand_over(turn: Turn) -> None:
        connection.send(turn)
        os.kill(os.getpid(), signal.SIGSTOP)
        if connection.poll():
            raise SystemExit

    contestant(Clock(steps, discard, hand_over), folder)


def interleave(
    contestants: dict[str, Contestant], *, steps: int, rounds: int, launches: int, discard: int = 2
) -> dict[str, list[Turn]]:
    """Time contestants in turns.

    Args:
        contestants: Name -> function at module level.
        steps: Steps a turn that count.
        rounds: Turns of each contestant in all.
        launches: How many times all processes are started afresh within these rounds.
        discard: Steps at the start of a turn that do not count.

    Returns:
        Name -> its turns, one a round.
    """
    os.environ.update(KEEP_MEMORY)  # inherited by the contestants
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    done = 0
    for launch in range(launches):
        share = (rounds - done) // (launches - launch)
        with ExitStack() as stack:
            racers = [_start(stack, name, contestants[name], steps, discard) for name in contestants]
            for number in range(share):
                shift = (done + number) % len(racers)
                for racer in racers[shift:] + racers[:shift]:
                    progress(f"round {done + number + 1}/{rounds}: {racer.name}")
                    turns[racer.name].append(racer.turn())
        done += share
    progress("")
    return turns


def _start(stack: ExitStack, name: str, contestant: Contestant, steps: int, discard: int) -> _Racer:
    """Start a contestant and let it run through a first turn, which does not count."""
    progress(f"starting {name}")
    folder = Path(tempfile.mkdtemp(prefix="floatline-benchmark-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(contestant, steps, discard, theirs, folder), daemon=True)
    process.start()
    theirs.close()
    racer = _Racer(name, process, ours, folder / "output")
    stack.callback(racer.end)
    racer.turn(first=True)
    return racer


@dataclass(frozen=True)
class Comparison:
    """One contestant against the baseline.

    Attributes:
        seconds: Median step.
        ratio: Median over rounds of this contestant's median step by the baseline's in the same round.
        low, high: 10th and 90th percentile of these ratios.
        added: Median over rounds of the difference of these medians, in seconds.
        cpu_ratio: As `ratio`, of processor time.
        check: See `Turn`; of the last turn.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float
    added: float
    cpu_ratio: float
    check: float | None


def compare(turns: dict[str, list[Turn]], baseline: str) -> list[Comparison]:
    """Set every contestant against `baseline`, round by round."""
    rows = []
    for name, own in turns.items():
        pairs = list(zip(own, turns[baseline], strict=True))
        ratios = [statistics.median(a.wall) / statistics.median(b.wall) for a, b in pairs]
        cpu_ratios = [statistics.median(a.cpu) / statistics.median(b.cpu) for a, b in pairs]
        rows.append(
            Comparison(
                name=name,
                seconds=statistics.median(seconds for turn in own for seconds in turn.wall),
                ratio=statistics.median(ratios),
                low=quantile(ratios, 0.1),
                high=quantile(ratios, 0.9),
                added=statistics.median(statistics.median(a.wall) - statistics.median(b.wall) for a, b in pairs),
                cpu_ratio=statistics.median(cpu_ratios),
                check=own[-1].check,
            )
        )
    return rows

"""What a trace holds: the life of every storage, in order, and what each op costs.

A storage is one piece of memory; tensors are views into it. An event is the pair (number of the storage, signed bytes):
`+n` when it is allocated, `-n` when its last tensor is gone. The first events of a trace are the storages that are
there before the first update: parameters and buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum


class Category(StrEnum):
    """What a storage is for."""

    PARAMETER = "parameters"
    GRADIENT = "gradients"
    OPTIMIZER = "optimizer state"
    ACTIVATION = "activations"
    LOGITS = "logits"
    INPUT = "inputs"
    BUFFER = "buffers"
    TEMPORARY = "temporaries"
    WORKSPACE = "workspaces"


class Phase(StrEnum):
    """Where in an update something happens."""

    START = "start"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    BETWEEN = "between"


@dataclass(slots=True)
class Storage:
    """One piece of memory, from where it came.

    Attributes:
        nbytes: Its size in bytes, before any allocator rounds it.
        category: What it turned out to be for; final when the trace is done.
        module: Dotted name of the module whose forward, or whose backward, allocated it.
        op: Name of the op that did, e.g. "aten.mm".
        phase: When.
        update: In which update, from 0; -1 before the first.
        host: It lies in host memory on the target, not on the device.
    """

    nbytes: int
    category: Category
    module: str
    op: str
    phase: Phase
    update: int
    host: bool = False


@dataclass(slots=True)
class OpCost:
    """What the calls of one op in one phase and number format add up to, over one update.

    Attributes:
        calls: Kernels launched.
        flops: Floating-point operations, a multiply and an add counted as two.
        nbytes: Bytes read and written.
    """

    calls: int = 0
    flops: int = 0
    nbytes: int = 0


@dataclass
class Trace:
    """Two updates (or one inference) as they would be on the target.

    Attributes:
        storages: By number; events refer to them.
        events: (number, signed bytes) in their order, device memory alone.
        host_events: The same for host memory.
        begins: Index in `events` where each update begins.
        costs: Of the last update, by (phase, op, dtype, FLOPs of a call, bytes of a call).
        assumptions: What the model's program asked of values that a trace cannot know, and what was answered.
        notes: What the techniques chose, and why.
        micro_batches: Of one update.
    """

    storages: list[Storage] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    host_events: list[tuple[int, int]] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    costs: dict[tuple[Phase, str, str, int, int], OpCost] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    micro_batches: int = 1

    def stretch(self, factor: float) -> None:
        """Multiply what forward and backward cost, where fewer micro-batches were run than an update has."""
        for (phase, *_), cost in self.costs.items():
            if phase in (Phase.FORWARD, Phase.BACKWARD) and factor != 1.0:
                cost.calls = round(cost.calls * factor)
                cost.flops, cost.nbytes = round(cost.flops * factor), round(cost.nbytes * factor)

    def repeat(self) -> None:
        """Append another update with the events of the last one, as it goes when what the first one left is there.

        What is still alive at the end of the last update (optimizer state, above all) was made once and is not made
        again. Right for programs that do the same in each update but for that.
        """
        begin = self.begins[-1]
        last = self.events[begin:]
        born = {number for number, nbytes in last if nbytes > 0}
        passing = born & {number for number, nbytes in last if nbytes < 0}
        self.begins.append(len(self.events))
        again: dict[int, int] = {}
        for number, nbytes in last:
            if number not in passing:
                continue
            if number not in again:
                again[number] = len(self.storages)
                made = self.storages[number]
                self.storages.append(replace(made, update=made.update + 1))
            self.events.append((again[number], nbytes))

    @property
    def flops(self) -> int:
        """FLOPs of one update."""
        return sum(cost.flops for cost in self.costs.values())


def peak_of(events: list[tuple[int, int]]) -> tuple[int, int]:
    """Return the most bytes alive at once and the index of the event that reached it.

    >>> peak_of([(0, 4), (1, 8), (1, -8), (2, 6)])
    (12, 1)
    """
    live, best, at = 0, 0, -1
    for index, (_, nbytes) in enumerate(events):
        live += nbytes
        if live > best:
            best, at = live, index
    return best, at

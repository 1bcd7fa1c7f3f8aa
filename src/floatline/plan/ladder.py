"""The ladder: what techniques there are to climb, from the cheapest in time to the dearest, and what each rung gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from floatline.plan.estimate import Estimate
from floatline.plan.probe import Probe

MOST_MICRO_BATCHES = 64
"""More save little: a 64th of the activations is left."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One technique that a plan may use.

    Args:
        name: Its name.
        text: The technique as it is written.
        worth: (probe, last estimate) -> "" where it may save something, else why it cannot.
        changes: What it does to the numbers of training; "" where they are those of the plain step, to rounding.
    """

    name: str
    text: str
    worth: Callable[[Probe, Estimate], str]
    changes: str = ""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder: the techniques so far, with one more.

    Attributes:
        added: The technique that was added; "" for the plain step at the bottom.
        estimate: With all of them.
        saved: Bytes of peak that it took off, against the rung below.
        slowdown: Time of an update, as a multiple of the bottom rung's.
        kept: Whether it stays on for the rungs above; one that saves nothing does not.
    """

    added: str
    estimate: Estimate
    saved: int
    slowdown: float
    kept: bool = True


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A technique that is not in the plan, and why."""

    name: str
    reason: str


def _logits(probe: Probe, last: Estimate) -> str:
    return "" if last.categories.get("logits") else "no logits are held at the peak"


def _rows(probe: Probe, last: Estimate) -> str:
    return "" if probe.rows > 1 else f"the batch has {probe.rows} row, there is nothing to cut"


def _activations(probe: Probe, last: Estimate) -> str:
    return "" if last.categories.get("activations") else "no activations are held at the peak"


def _layers(probe: Probe, last: Estimate) -> str:
    return _activations(probe, last) if probe.layers else "the model has no repeated layers"


def _adam(probe: Probe, last: Estimate) -> str:
    return _state(probe, last) or ("" if probe.adam else f"it replaces AdamW, the optimizer is {probe.optimizer}")


def _state(probe: Probe, last: Estimate) -> str:
    return "" if last.states.get("optimizer state") else "the optimizer keeps no state"


def most_micro_batches(rows: int) -> int:
    """Return into how many micro-batches a batch is cut at most: a number that divides it, up to 64.

    >>> most_micro_batches(32), most_micro_batches(96), most_micro_batches(97)
    (32, 48, 64)
    """
    numbers = [number for number in range(2, min(rows, MOST_MICRO_BATCHES) + 1) if rows % number == 0]
    return max(numbers, default=max(2, min(rows, MOST_MICRO_BATCHES)))


def candidates(probe: Probe) -> list[Candidate]:
    """Return the rungs in the order in which they are tried.

    The order is that of the time they take: the chunked loss costs next to nothing, smaller micro-batches launch more
    kernels, 8-bit state is converted at each update, selective checkpointing computes cheap ops again and checkpointing
    of whole layers all of them, and what is offloaded travels over the bus.
    """
    eight_bit = "8-bit moments: updates differ slightly"
    return [
        Candidate(name="attention", text="attention", worth=lambda p, _: "" if p.eager else p.attention_note),
        Candidate(name="chunked_loss", text="chunked_loss", worth=_logits),
        Candidate(
            name="accumulation", text=f"accumulation(micro_batches={most_micro_batches(probe.rows)})", worth=_rows
        ),
        Candidate(name="low_bit_optimizer", text="low_bit_optimizer", worth=_adam, changes=eight_bit),
        Candidate(name="checkpointing", text="checkpointing(keep='matmul')", worth=_layers),
        Candidate(name="checkpointing", text="checkpointing", worth=_layers),
        Candidate(name="offload", text="offload", worth=_activations),
        Candidate(name="optimizer_offload", text="optimizer_offload", worth=_state),
    ]

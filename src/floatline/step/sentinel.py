"""The guard at work: judges each update before it is made, makes the good ones, counts the rest.

Loss, total gradient norm and the buffers that the forward wrote must be finite. The verdict is a tensor on the model's
device. Where the optimizer can select on the device (fused optimizers take `found_inf`), the verdict is handed to it
and nothing waits; the host reads the numbers one step later. Elsewhere the host reads the verdict at once, which costs
nothing on CPU and one wait for the device on CUDA. Clipping comes after the verdict: `clip_grad_norm_` alone would
turn one Inf into NaN everywhere (pytorch#46849).

A gradient that overflows under loss scaling is routine: the update is skipped, the scale halves, training goes on. A
non-finite loss, or a non-finite gradient without loss scaling or at a scale of 1 and less, is a fault. Both are
counted; too many stop the run.

Of several ranks all judge the same numbers, the loss and norm of all data, so all of them skip an update or none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from floatline.errors import NonFiniteError
from floatline.step.guard import Guard
from floatline.step.norm import GradientNorms
from floatline.step.readback import Readback
from floatline.step.verdict import Alarm, Skip, What
from floatline.techniques.optim_steps.select_step import can_select, step_by_select


@dataclass(frozen=True)
class Rerun:
    """A micro-batch and the random state before its forward.

    Attributes:
        batch: As the step was given it.
        random: torch's generators, CPU and the device's.
    """

    batch: Any
    random: tuple[torch.Tensor, ...]


@dataclass
class Judged:
    """One update that was judged, with what is read only when something is wrong.

    Attributes:
        step: Its index.
        reading: Loss, gradient norm, and the norm of live buffers where there are any.
        norms: Of the single gradients, to say whose was at fault.
        left_out: Index and loss of the micro-batches that were left out.
        made: It was made all the same, from the others.
        scale: The loss scale that it ran under, once it is known.
        scale_read: It is the last number of `reading`, for it is on a device.
        late: Its verdict was read when the next update had been run, and made unless it was condemned as well.
        reruns: Its micro-batches with what it takes to run them again.
    """

    step: int
    reading: Readback
    norms: GradientNorms | None = None
    left_out: tuple[tuple[int, float], ...] = ()
    made: bool = False
    scale: float | None = None
    reruns: tuple[Rerun, ...] = ()
    scale_read: bool = False
    late: bool = False


def _steps_on(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Say whether the optimizer's parameters are on `device`; offloaded ones are in host memory."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return next((parameter.device == device for parameter in parameters), True)


class Sentinel:
    """Judges updates and counts those that were not made.

    Args:
        guard: The limits.
        loss_scaling: Whether gradients were scaled, so that overflow is routine.

    Attributes:
        skips: The last 1000 skipped updates.
        skipped: How many updates were skipped in all.
        noted: How many skips there were in all, updates made without a micro-batch among them.
        faults: How many of them for a fault.
        alarms: The last 1000 alarms.
        alarmed: How many there were in all.
        on_fault: Called with each fault and what was judged, before the limits are looked at. While it is set, the step
            keeps the micro-batches and random states of an update until its verdict is read.
    """

    def __init__(self, guard: Guard, *, loss_scaling: bool) -> None:
        self.guard = guard
        self.loss_scaling = loss_scaling
        self.skips: deque[Skip] = deque(maxlen=1000)
        self.skipped = 0
        self.noted = 0
        self.faults = 0
        self.alarms: deque[Alarm] = deque(maxlen=1000)
        self.alarmed = 0
        self.on_fault: Callable[[Skip, Judged], None] | None = None
        self.on_number: Callable[[int, float, float], None] = lambda step, loss, grad_norm: None
        self._row: dict[bool, int] = {True: 0, False: 0}
        self._pending: Judged | None = None

    @property
    def faults_in_a_row(self) -> int:
        """Faults since the last update that was made."""
        return self._row[True]

    @staticmethod
    def judge(loss: torch.Tensor, grad_norm: torch.Tensor, buffers: torch.Tensor | None = None) -> torch.Tensor:
        """Return a 0-d bool tensor: all finite.

        What is added is 0 times the norm, NaN where that is not finite: the sum of two numbers that are may not be.
        """
        total = torch.add(loss, grad_norm, alpha=0)
        return torch.isfinite(total if buffers is None else total + buffers)

    def make_update(self, optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
        """Run `optimizer.step()` if the verdict is good, without waiting where the optimizer can select."""
        if finite.is_cuda and can_select(optimizer) and _steps_on(optimizer, finite.device):
            step_by_select(optimizer, finite)
        elif finite:
            optimizer.step()

    def record(self, judged: Judged) -> Skip | None:
        """Count this update, or, where reading would wait for the device, the one before it.

        Returns:
            The skip, where there was one.

        Raises:
            NonFiniteError: Too many skipped updates.
        """
        if judged.reading.waits:
            if self._pending is not None:
                self._pending.late = True
            earlier = self.flush()
            self._pending = judged
            return earlier
        return self._count(judged)

    def flush(self) -> Skip | None:
        """Count an update that is still on its way from the device.

        Raises:
            NonFiniteError: Too many skipped updates.
        """
        judged, self._pending = self._pending, None
        return self._count(judged) if judged is not None else None

    def _count(self, judged: Judged) -> Skip | None:
        numbers = judged.reading.tolist()
        if judged.scale_read:
            judged.scale = numbers.pop()
        finite = all(number - number == 0.0 for number in numbers)  # by the same rule as `judge`
        if judged.left_out and (finite or not judged.made):
            return self._note(self._left_out(judged, numbers), judged)
        if finite:
            self._row[True] = self._row[False] = 0
            self.on_number(judged.step, numbers[0], numbers[1])
            return None
        what = self._what(judged, numbers)
        blamed = self._blamed(judged) if what in (What.GRADIENT, What.OVERFLOW) else ()
        return self._note(Skip(judged.step, what, numbers[0], numbers[1], blamed), judged)

    def _left_out(self, judged: Judged, numbers: list[float]) -> Skip:
        places = tuple(place for place, _ in judged.left_out)
        loss = judged.left_out[0][1]
        return Skip(judged.step, What.LOSS, loss, numbers[1], micro_batches=places, made=judged.made)

    def _note(self, skip: Skip, judged: Judged) -> Skip:
        self.skips.append(skip)
        self.skipped += not skip.made
        self.noted += 1
        self.faults += skip.fault
        if skip.made:
            self._row[True] = self._row[False] = 0
        else:
            self._row[skip.fault] += 1
        if skip.fault and self.on_fault is not None:
            self.on_fault(skip, judged)
        self._stop_if_too_many(skip, judged.late)
        return skip

    def _what(self, judged: Judged, numbers: list[float]) -> What:
        loss = numbers[0]
        if loss - loss != 0.0:
            return What.LOSS
        if len(numbers) > 2 and numbers[2] - numbers[2] != 0.0:  # before overflow, which it might be as well
            return What.BUFFER
        routine = self.loss_scaling and (judged.scale is None or 1.0 < judged.scale < float("inf"))
        return What.OVERFLOW if routine else What.GRADIENT

    def _blamed(self, judged: Judged) -> tuple[str, ...]:
        return tuple(judged.norms.culprits()) if judged.norms is not None else ()

    def _stop_if_too_many(self, skip: Skip, late: bool) -> None:
        guard = self.guard
        if skip.fault and guard.on_fault == "stop":
            raise NonFiniteError(
                f"stopped at the first fault: {skip.reason}",
                hint=f"{_weights_of('it', late)}; guard.on_fault=skip goes on",
            )
        key = "max_faults_in_a_row" if skip.fault else "max_overflows_in_a_row"
        limit = getattr(guard, key)
        if self._row[skip.fault] >= limit:
            self._stop(
                f"{self._row[skip.fault]} skipped updates in a row: {skip.reason}",
                _weights_of("the first of them", late),
                key,
                limit,
            )
        if skip.fault and guard.max_faults is not None and self.faults >= guard.max_faults:
            what = f"{self.faults} faults in all, the last: {skip.reason}"
            self._stop(what, _weights_of("it", late), "max_faults", guard.max_faults)

    def _stop(self, what: str, weights: str, key: str, limit: int) -> None:
        raise NonFiniteError(
            f"stopped after {what}",
            hint=f"{weights}; look at the learning rate, the data and the precision, "
            f"or raise guard.{key} (now {limit})",
        )

    def alarm(self, alarm: Alarm) -> None:
        """Take note of silent trouble."""
        self.alarms.append(alarm)
        self.alarmed += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, for a checkpoint."""
        self.flush()
        return self.counts()

    def counts(self) -> dict[str, Any]:
        """Return the counters, without an update that is still on its way."""
        return {
            "skipped": self.skipped,
            "faults": self.faults,
            "faults_in_a_row": self._row[True],
            "overflows_in_a_row": self._row[False],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pending = None
        self.skipped = state["skipped"]
        self.faults = state.get("faults", 0)  # of a run that did not count them
        self._row = {True: state["faults_in_a_row"], False: state["overflows_in_a_row"]}


def _weights_of(before: str, late: bool) -> str:
    """Say which weights a run that is stopped is left with; a skipped update changes none, a later one may have."""
    if not late:
        return f"the weights are as before {before}"
    return (
        f"the weights are as before {before}, or one good update on: on this device the verdict is read when the next "
        "update has been run"
    )

"""The guard: a non-finite loss or gradient never reaches the weights.

Each update is judged before it is made: loss and total gradient norm must be finite. The verdict is a tensor on the
model's device. Where the optimizer can select on the device (fused optimizers take `found_inf`), the verdict is handed
to it and nothing waits; the host reads the verdict one step later. Elsewhere the host reads it at once, which costs
nothing on CPU and one wait for the device on CUDA. Clipping comes after the verdict: `clip_grad_norm_` alone would
turn one Inf into NaN everywhere (pytorch#46849).

A gradient that overflows under loss scaling is routine: the update is skipped, the scale halves, training goes on. A
non-finite loss, or a non-finite gradient without loss scaling, is a fault. Both are counted; too many in a row stop
the run.

Of several ranks all judge the same numbers, the loss and norm of all data, so all of them skip an update or none.

Not covered yet: buffers that a condemned forward has changed, rollback and healing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import torch

from floatline.errors import ConfigError, NonFiniteError
from floatline.techniques.optim_steps.select_step import can_select, step_by_select


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How many condemned updates a run may survive.

    Args:
        max_faults_in_a_row: Stop when this many updates in a row were skipped for a fault; 1 stops at the first.
        max_overflows_in_a_row: Stop when the loss scale fell this many times in a row. From 2^16, 24 halvings
            mean a scale below 2^-8: no longer a search for the right scale.

    Raises:
        ConfigError: A limit below 1.
    """

    max_faults_in_a_row: int = 5
    max_overflows_in_a_row: int = 24

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"guard.{name} is {value}", hint="give 1 or more")


class What(Enum):
    """What a skipped update was skipped for."""

    LOSS = "loss"
    GRADIENT = "gradient"
    OVERFLOW = "overflow"


@dataclass(frozen=True)
class Skip:
    """One update that was not made.

    Args:
        step: Index of the update, the first is 1.
        what: LOSS and GRADIENT are faults, OVERFLOW is routine under loss scaling.
        loss: The loss as it was, NaN and inf included.
        grad_norm: The gradient norm as it was.
    """

    step: int
    what: What
    loss: float
    grad_norm: float

    @property
    def fault(self) -> bool:
        return self.what is not What.OVERFLOW

    @property
    def reason(self) -> str:
        if self.what is What.LOSS:
            return f"the loss was {self.loss} at update {self.step}"
        if self.what is What.GRADIENT:
            return f"the gradient norm was {self.grad_norm} at update {self.step} (loss {self.loss:.4g})"
        return f"scaled fp16 gradients overflowed at update {self.step}; the loss scale was halved"


def _steps_on(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Say whether the optimizer's parameters are on `device`; offloaded ones are in host memory."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return next((parameter.device == device for parameter in parameters), True)


class Sentinel:
    """The guard at work: judges updates, makes the good ones, counts the rest.

    Args:
        guard: The limits.
        loss_scaling: Whether gradients were scaled, so that overflow is routine.

    Attributes:
        skips: The last 1000 skipped updates.
        skipped: How many updates were skipped in all.
    """

    def __init__(self, guard: Guard, *, loss_scaling: bool) -> None:
        self.guard = guard
        self.loss_scaling = loss_scaling
        self.skips: deque[Skip] = deque(maxlen=1000)
        self.skipped = 0
        self._row: dict[bool, int] = {True: 0, False: 0}
        self._pending: tuple[int, torch.Tensor, torch.cuda.Event] | None = None

    @staticmethod
    def judge(loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Return a 0-d bool tensor: both finite. Adding is enough, since inf - inf and NaN are not finite either."""
        return torch.isfinite(loss + grad_norm)

    def make_update(self, optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
        """Run `optimizer.step()` if the verdict is good, without waiting where the optimizer can select."""
        if finite.is_cuda and can_select(optimizer) and _steps_on(optimizer, finite.device):
            step_by_select(optimizer, finite)
        elif finite:
            optimizer.step()

    def record(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Count this update, or, where reading would wait for the device, the one before it.

        Raises:
            NonFiniteError: Too many skipped updates in a row.
        """
        if loss.is_cuda:
            self.flush()
            values = torch.stack([loss.float(), grad_norm.float()])
            host = torch.empty(2, pin_memory=True)
            host.copy_(values, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
            self._pending = (step, host, done)
        else:
            self._count(step, loss.item(), grad_norm.item())

    def flush(self) -> None:
        """Count an update that is still on its way from the device.

        Raises:
            NonFiniteError: Too many skipped updates in a row.
        """
        if self._pending is not None:
            step, host, done = self._pending
            self._pending = None
            done.synchronize()
            self._count(step, *host.tolist())

    def _count(self, step: int, loss: float, grad_norm: float) -> None:
        total = loss + grad_norm
        if total - total == 0.0:  # finite, by the same rule as `judge`, without a call
            self._row[True] = self._row[False] = 0
            return
        skip = Skip(step, self._what(loss), loss, grad_norm)
        self.skips.append(skip)
        self.skipped += 1
        self._row[skip.fault] += 1
        self._stop_if_too_many(skip)

    def _what(self, loss: float) -> What:
        if loss - loss != 0.0:
            return What.LOSS
        return What.OVERFLOW if self.loss_scaling else What.GRADIENT

    def _stop_if_too_many(self, skip: Skip) -> None:
        limit = self.guard.max_faults_in_a_row if skip.fault else self.guard.max_overflows_in_a_row
        if self._row[skip.fault] < limit:
            return
        key = "max_faults_in_a_row" if skip.fault else "max_overflows_in_a_row"
        raise NonFiniteError(
            f"stopped after {self._row[skip.fault]} skipped updates in a row: {skip.reason}",
            hint="the weights are as before the first of them; look at the learning rate, the data and the precision, "
            f"or raise guard.{key} (now {limit})",
        )

    def state_dict(self) -> dict[str, int]:
        """Return the counters, for a checkpoint."""
        self.flush()
        return {
            "skipped": self.skipped,
            "faults_in_a_row": self._row[True],
            "overflows_in_a_row": self._row[False],
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._pending = None
        self.skipped = state["skipped"]
        self._row = {True: state["faults_in_a_row"], False: state["overflows_in_a_row"]}

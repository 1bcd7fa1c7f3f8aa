"""The guard's settings: what is judged, what is done about a fault, and how much of it a run may survive.

What it does is in sentinel.py (verdicts), live_buffers.py, snapshot.py (rollback) and silent.py (trouble without NaN).
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch

from floatline.errors import ConfigError

OnFault = Literal["skip", "rollback", "stop", "heal"]
Check = Literal["auto", "before-backward", "after-backward"]
_LIMITS = {
    "max_faults_in_a_row": False,
    "max_faults": True,
    "max_overflows_in_a_row": False,
    "max_rollbacks": False,
    "snapshot_every": False,
    "sample_every": True,
}
"""Each limit, and whether it may be None."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What a run does about updates that are not finite.

    Args:
        on_fault: "skip" leaves the update out; "rollback" goes back to the last snapshot as well; "stop" ends the run
            at the first; "heal" goes back, diagnoses, and applies the remedy that cured the replay: `floatline train`
            does; in a loop of your own nobody diagnoses, so it goes back and warns.
        check: When the loss is looked at. "before-backward" reads it and leaves out the one micro-batch, which on
            CUDA waits for the device; "after-backward" condemns the whole update; "auto" is the first on CPU and the
            second on CUDA.
        max_faults_in_a_row: Stop when this many updates in a row were skipped for a fault; 1 stops at the first.
        max_faults: Stop when this many were skipped for a fault in all; None for no limit.
        max_overflows_in_a_row: Stop when the loss scale fell this many times in a row. From 2^16, 24 halvings
            mean a scale below 2^-8: no longer a search for the right scale.
        max_rollbacks: Stop instead of going back once more.
        snapshot_every: Updates between snapshots, for "rollback" and "heal". A snapshot is a copy of parameters and
            optimizer state in host memory.
        sample_every: Updates between looks for silent trouble (silent.py); None never looks.

    Raises:
        ConfigError: A limit that is no whole number of 1 and more, or a word that is not known.
    """

    on_fault: OnFault = "skip"
    check: Check = "auto"
    max_faults_in_a_row: int = 5
    max_faults: int | None = 100
    max_overflows_in_a_row: int = 24
    max_rollbacks: int = 3
    snapshot_every: int = 100
    sample_every: int | None = 100

    def __post_init__(self) -> None:
        for name, may_be_none in _LIMITS.items():
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                none = ", or None" if may_be_none else ""
                raise ConfigError(f"guard.{name} is {value!r}", hint=f"give a whole number, 1 or more{none}")
        for name, allowed in (("on_fault", get_args(OnFault)), ("check", get_args(Check))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"guard.{name} is {getattr(self, name)!r}", hint=f"allowed: {', '.join(allowed)}")

    @property
    def goes_back(self) -> bool:
        """Whether snapshots are needed."""
        return self.on_fault in ("rollback", "heal")

    def reads_early(self, device: torch.device, together: bool) -> bool:
        """Say whether a loss is read before its backward, so that its micro-batch alone can be left out.

        Args:
            device: Of the model. On CUDA reading waits, so "auto" does not.
            together: Ranks share every backward: none of them may leave one out alone.

        Raises:
            ConfigError: "before-backward" is asked for where every forward needs its backward.
        """
        if together and self.check == "before-backward":
            raise ConfigError(
                "guard.check is before-backward, but ranks that train together run every backward together",
                hint="use guard.check=after-backward: all ranks leave the update out",
            )
        on_host = self.check == "before-backward" or (self.check == "auto" and device.type == "cpu")
        return on_host and not together

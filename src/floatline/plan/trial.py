"""One estimate as a value: what `estimate` is asked, so that it can be remembered and sent to another process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from floatline.hardware import Hardware
from floatline.plan.allocator import AllocatorSettings
from floatline.plan.estimate import Estimate, estimate
from floatline.plan.shape import Shape
from floatline.plan.traces import TraceCache, rank_count
from floatline.precision import Policy
from floatline.step import Workload
from floatline.techniques import Technique, fake_ranks


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is tried. Two trials that differ in `told` only are the same one.

    Args:
        hardware: The device.
        precision: A policy, its string, or "auto".
        techniques: In the order in which the estimate names them.
        mode: "train" or "inference".
        max_grad_norm: As for `TrainStep`.
        allocator: Settings of the caching allocator; None for torch's defaults.
        ranks: How many processes train together.
        shape: Another shape of the batch than the one that is planned.
        told: How a person is told what is tried.
    """

    hardware: Hardware
    precision: str | Policy
    techniques: tuple[Technique | str, ...] = ()
    mode: str = "train"
    max_grad_norm: float | None = 1.0
    allocator: AllocatorSettings | None = None
    ranks: int = 1
    shape: Shape | None = None
    told: str = field(default="", compare=False)

    def estimate(self, work: Workload, traces: TraceCache | None = None) -> Estimate:
        """Make the estimate in this process.

        Args:
            work: The workload, in the trial's shape.
            traces: Traces of this workload to take from and to add to.
        """
        with _ranks(self.ranks):
            return estimate(work, self.hardware, self.precision, self.techniques, self.mode, quick=True, traces=traces,
                            max_grad_norm=self.max_grad_norm, allocator=self.allocator)  # fmt: skip


def _ranks(number: int) -> AbstractContextManager[None]:
    return nullcontext() if number == rank_count() else fake_ranks(number)

"""What one update did, as its caller gets it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepOutput:
    """What one update did. Tensors stay on the device; reading them is the caller's wait.

    Attributes:
        loss: 0-d, weighted mean over the micro-batches, as it was (NaN included).
        grad_norm: 0-d fp32, total 2-norm of the unscaled gradients before clipping.
        applied: 0-d bool, False where the guard skipped the update.
        left_out: Indices of micro-batches without which it was made, because their loss was not finite.
        rolled_back_to: The number of updates that the guard went back to, None where it did not. On CUDA it is the
            update before whose fault is known by now.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    applied: torch.Tensor
    left_out: tuple[int, ...] = ()
    rolled_back_to: int | None = None

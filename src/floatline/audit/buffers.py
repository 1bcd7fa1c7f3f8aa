"""Running averages that a forward writes, in buffers or in weights that take no gradient (a teacher, a momentum
encoder): do they still move in the lower format?
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from floatline.audit.judging import STALLED


def stalled_buffers(
    before: Mapping[str, torch.Tensor], after: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """Return running averages that keep most of their bits where the exact ones move.

    Args:
        before: Buffer or weight -> value before the forward.
        after: The same -> value after it, and the exact one.

    Returns:
        Name -> share of the elements that should have moved and did not, where it is above the threshold.
    """
    found = {}
    for name, (low, exact) in after.items():
        if name not in before or before[name].shape != low.shape:  # made or grown in the forward: no average
            continue
        start = before[name].to(low.dtype)
        moving = exact != before[name].double()
        stuck = moving & (low == start)
        share = float(stuck.sum()) / max(int(moving.sum()), 1)
        if share > STALLED:
            found[name] = share
    return found

"""The total gradient norm: what is judged, clipped by and reported."""

from __future__ import annotations

import torch

from floatline.errors import ConfigError


def total_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm over all gradients together, 0-d fp32; `get_total_norm` would round it to a half format.

    Raises:
        ConfigError: No parameter has a gradient.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise ConfigError(
            "no gradient reached any parameter of the optimizer", hint="pass it the parameters that the loss depends on"
        )
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    total = torch.linalg.vector_norm(torch.stack(norms))
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # of shards: summed over the ranks

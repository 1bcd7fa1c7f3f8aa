"""The total gradient norm: what is judged, clipped by and reported; and the norms of single gradients in it.

The norm of each gradient is computed on the way. It is read only where the total is not finite, and then says whose
gradient is at fault.
"""

from __future__ import annotations

import torch

from floatline.errors import ConfigError


def gradient_norms(parameters: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the parameters that have a gradient, and the 2-norms of their gradients stacked, fp32.

    Of shards the norms are those of the whole gradients' shares on this rank.

    Raises:
        ConfigError: No parameter has a gradient.
    """
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in owners if parameter.grad is not None]
    if not owners:
        raise ConfigError(
            "no gradient reached any parameter of the optimizer", hint="pass it the parameters that the loss depends on"
        )
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return owners, torch.stack(norms)


def total_of(norms: torch.Tensor) -> torch.Tensor:
    """Return the 2-norm over all gradients together, 0-d fp32; `get_total_norm` would round it to a half format."""
    total = torch.linalg.vector_norm(norms)
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # of shards: summed over the ranks


def total_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm over all gradients of `parameters` together, 0-d fp32.

    Raises:
        ConfigError: No parameter has a gradient.
    """
    return total_of(gradient_norms(parameters)[1])


def not_finite(owners: list[torch.Tensor], norms: torch.Tensor) -> list[torch.Tensor]:
    """Return the parameters whose gradient is not finite; reading the norms waits for a device."""
    whole = norms.full_tensor() if hasattr(norms, "full_tensor") else norms
    return [owner for owner, norm in zip(owners, whole.tolist(), strict=True) if norm - norm != 0.0]

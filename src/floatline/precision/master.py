"""Master weights: the optimizer works on an fp32 copy of half-precision weights.

Forward and backward use the model's fp16 weights; before the update the gradients are copied up to the masters, the
optimizer steps those, and the result is rounded back down into the model. Costs 4 bytes a parameter (plus 4 for the
fp32 gradient while it exists).
"""

from __future__ import annotations

import torch


class NoMasterWeights:
    """The null object: the optimizer works on the model's own weights."""

    def pull_gradients(self) -> None:
        pass

    def push_weights(self) -> None:
        pass

    def state(self) -> list[torch.Tensor]:
        return []

    def load_state(self, masters: list[torch.Tensor]) -> None:
        pass

    def undo(self) -> None:
        pass


class MasterWeights(NoMasterWeights):
    """fp32 copies of an optimizer's half-precision parameters, swapped into its parameter groups.

    Args:
        optimizer: Its groups hold the model's parameters; afterwards they hold the masters. State that already exists
            moves with them.
        masters: Initial fp32 values by parameter (weights as they were before they were cast down), where known.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, masters: dict[torch.Tensor, torch.Tensor]) -> None:
        self.optimizer = optimizer
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._master_of(parameter, masters.get(parameter)) for parameter in group["params"]]

    def _master_of(self, parameter: torch.Tensor, value: torch.Tensor | None) -> torch.Tensor:
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            return parameter
        source = parameter if value is None else value
        master = source.detach().to(torch.float32, copy=True).requires_grad_()
        self.pairs.append((parameter, master))
        self._move_state(parameter, master)
        return master

    def _move_state(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source in self.optimizer.state:
            self.optimizer.state[target] = self.optimizer.state.pop(source)

    def pull_gradients(self) -> None:
        """Move the model's gradients to the masters, in fp32."""
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.to(torch.float32)
            parameter.grad = None

    @torch.no_grad()
    def push_weights(self) -> None:
        """Round the masters down into the model."""
        if self.pairs:
            torch._foreach_copy_([_on_this_rank(p) for p, _ in self.pairs], [_on_this_rank(m) for _, m in self.pairs])

    def state(self) -> list[torch.Tensor]:
        """Return the masters in the optimizer's order, for a checkpoint."""
        return [master.detach() for _, master in self.pairs]

    @torch.no_grad()
    def load_state(self, masters: list[torch.Tensor]) -> None:
        for (_, master), saved in zip(self.pairs, masters, strict=True):
            master.copy_(saved)
        self.push_weights()

    def undo(self) -> None:
        """Give the optimizer the model's own parameters back."""
        back = {id(master): parameter for parameter, master in self.pairs}
        for group in self.optimizer.param_groups:
            group["params"] = [back.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter, master in self.pairs:
            self._move_state(master, parameter)
        self.pairs.clear()


def _on_this_rank(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor in shards, which share one layout; others as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

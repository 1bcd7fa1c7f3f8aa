"""Run a model's forward and backward for their side effects alone: everything that training reads is put back.

Compiling, autotuning and measuring want a real step before the first one, and the run must not differ for it. Put back
are the generators of random numbers (CPU and all CUDA devices in use), buffers (running statistics of batch norm) with
their objects, and gradients. Parameters do not change without an update.

Not covered: Python attributes that a model sets in its forward, and random numbers of `random` and numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Context after which random state, buffers and gradients are as they were before.

    >>> norm = nn.BatchNorm1d(2)
    >>> with undisturbed(norm):
    ...     _ = norm(torch.ones(4, 2))
    >>> int(norm.num_batches_tracked)
    0
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    buffers = [(owner, key, buffer, buffer.detach().clone()) for owner, key, buffer in _buffers(model)]
    try:
        with gradients_aside(model.parameters()), torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for owner, key, buffer, value in buffers:
                buffer.copy_(value)
                owner._buffers[key] = buffer


@contextmanager
def gradients_aside(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Context without gradients, to which a backward would add; those that were there come back, untouched.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> with gradients_aside([weight]):
    ...     weight.sum().backward()
    >>> weight.grad is None
    True
    """
    before = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
    try:
        for tensor, _ in before:
            tensor.grad = None
        yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield module, key, buffer

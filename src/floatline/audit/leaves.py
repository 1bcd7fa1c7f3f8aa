"""What a backward writes gradients of: the leaves of a graph, found before it runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def leaves_of(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors whose gradients a backward from `value` adds to; not those inside of reentrant checkpoints.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> [leaf is weight for leaf in leaves_of((weight * 2 + weight).sum())]
    [True]
    """
    todo, seen = [value.grad_fn], {value.grad_fn, None}
    while todo:
        node = todo.pop()
        if isinstance(leaf := getattr(node, "variable", None), torch.Tensor):
            yield leaf
        found = {after for after, _ in node.next_functions} - seen if node is not None else set()
        seen |= found
        todo.extend(found)

"""A backward that adds to nobody else's gradients: the leaves of its graph are found before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from floatline.step.undisturbed import gradients_aside


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


def backward_alone(loss: torch.Tensor, own: Iterable[torch.Tensor] = ()) -> None:
    """Run a backward after which other leaves than `own` have the gradients that they had before.

    Args:
        loss: A scalar.
        own: Tensors whose gradients are wanted; a loss or a function may close over weights besides.
    """
    wanted = {id(tensor) for tensor in own}
    with gradients_aside(leaf for leaf in leaves_of(loss) if id(leaf) not in wanted):
        loss.backward()

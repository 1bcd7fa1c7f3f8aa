"""Chunked cross-entropy: the logits never exist whole.

The logits of a language model are its largest tensor: tokens x vocabulary, in the compute format, once more in fp32 for
the loss, and again for their gradient. Here the output head returns logits that are not computed yet
(logits/deferred.py), and the model's own call of `F.cross_entropy` goes through them in chunks of tokens, each
recomputed in the backward. What is kept are the hidden states, which exist anyway. The price is one more product of
hidden states and head weight.

Nothing of the model is rewritten, and the loss may have a soft cap, a shift, a scale or class weights. Loss and
gradients equal the plain ones to rounding: sums run in another order. Under autocast the weight's gradient is summed
over the chunks in fp32, where the plain step rounds one product.

In evaluation, and where no gradients are recorded, the head is as before, so that generation works. Whoever takes
`output.logits` in training gets the real ones, with a warning that they exist after all.

Fused kernels (Liger, torch's `linear_cross_entropy` with options) compute the gradients in the forward. They are not
offered: those gradients are rounded to the format of the hidden states before the loss scale multiplies them, so fp16
gradients below 6e-8 are lost that loss scaling would have kept; and they take a weight, not a head with adapters.

Not covered: losses other than cross-entropy; targets that are ignored are computed like the others. While a
chunk's weight gradient is added to the sum there are two tensors of the weight's size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from floatline.errors import FloatlineWarning
from floatline.hardware import Hardware
from floatline.patch import ForwardPatch
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.logits.deferred import defer
from floatline.techniques.logits.heads import find_head
from floatline.techniques.logits.recipe import Ledger


@dataclass(frozen=True, kw_only=True)
class ChunkedLoss(Technique):
    """Compute the cross-entropy of an output head chunk by chunk.

    Args:
        chunk_tokens: Tokens of a chunk. Peak memory is about chunk_tokens x vocabulary x 12 bytes.
        head: Name or pattern of the output head, a Linear layer; None finds it.

    Raises:
        ConfigError: `chunk_tokens` below 1.

    Example:
        >>> str(ChunkedLoss(chunk_tokens=256))
        'chunked_loss(chunk_tokens=256)'
    """

    name = "chunked_loss"
    stage = Stage.HEAD

    chunk_tokens: int = 1024
    head: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("chunk_tokens", 1)

    def conflict_with(self, other: Technique) -> str | None:
        if other.name == "compile" and getattr(other, "scope", None) == "model":
            return (
                "a whole compiled model has its loss compiled in; compile its layers instead: compile(scope='layers')"
            )
        return super().conflict_with(other)

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        name, reason = find_head(model, self.head)
        if not name:
            return Applied(technique=self, touched=(), notes=(reason,))
        counted: dict[str, float] = {}
        ledger = Ledger(self.chunk_tokens, counted, _warner())
        patch = ForwardPatch(model.get_submodule(name)).install(_deferring(ledger))
        return Applied(
            technique=self,
            touched=(name,),
            undo=patch.undo,
            notes=(f"the output head is {name}: {reason}",),
            facts=lambda: dict(counted),
        )


def _deferring(ledger: Ledger) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def deferring_forward(self: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
                return forward(self, hidden, *args, **kwargs)
            return defer(self, lambda rows: forward(_gathered(self), rows, *args, **kwargs), hidden, ledger)

        return deferring_forward

    return wrap


def _gathered(head: nn.Module) -> nn.Module:
    """Return the head with its weights whole: FSDP shards a head of its own again after its call, chunks come later."""
    unshard: Any = getattr(head, "unshard", None)
    if unshard is not None:
        unshard()
    return head


def _warner() -> Callable[[str, torch.Size], None]:
    """Return a function that warns of an op that needs whole logits, once an op."""
    told: set[str] = set()

    def warn(op: str, shape: torch.Size) -> None:
        if op not in told:
            told.add(op)
            warnings.warn(
                f"chunked_loss: {op} needs the logits, {' x '.join(map(str, shape))}, so they are computed whole after "
                "all; take the loss by F.cross_entropy, use logits in evaluation only, or drop chunked_loss",
                FloatlineWarning,
                stacklevel=4,
            )

    return warn

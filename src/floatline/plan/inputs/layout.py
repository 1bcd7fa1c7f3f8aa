"""What all batches share: the layout, ids that no rule trips over, and noise.

Two kinds of tensors, two rules. Ids, labels, grids and masks steer the program (where the image tokens are, how long a
sequence is), so they are real even when the batch is made under a fake mode. Pixels and sounds are only weighed and
multiplied: they are made in whatever mode is active, so a batch of a thousand images costs nothing when it is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from floatline.plan.shape import Shape, SizeChoice
from floatline.step.batch import IGNORED, LossFunction

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a batch of one shape looks.

    Args:
        shape: The sizes, all that apply filled in.
        batch: Factory of the batch.
        loss: As in `Workload`; None where the model's output holds the loss.
        limits: The largest value the model takes, by name of the size ("seq", "target").
        choices: The sizes that were left open, each with its reason.
        notes: Sentences a user should read: roundings and what was assumed.
        facts: Counts a sample: "tokens", "visual_tokens", "patches", "frames".
    """

    shape: Shape
    batch: Callable[[], dict[str, Any]]
    loss: LossFunction | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    choices: tuple[SizeChoice, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def real() -> Iterator[None]:
    """Leave fake and other dispatch modes, so that tensors are made for real."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.device("cpu"):
        yield


def token_ids(batch: int, length: int, vocabulary: int, special: frozenset[int] = frozenset()) -> torch.Tensor:
    """Return random token ids (batch, length), int64, none of them special (padding, image, end)."""
    plain = next(token for token in range(len(special) + 1) if token not in special)
    with real():
        ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(SEED))
        if special:
            ids[torch.isin(ids, torch.tensor(sorted(special)))] = plain if plain < vocabulary else 0
    return ids


def class_ids(batch: int, classes: int) -> torch.Tensor:
    """Return labels (batch,), int64, that go through the classes in turn."""
    with real():
        return torch.arange(batch) % classes


def masked_labels(ids: torch.Tensor, share: float = 0.15) -> torch.Tensor:
    """Return labels for a masked language model: `share` of the ids, the others ignored, at least one a row."""
    with real():
        picked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(SEED)) < share
        picked[:, 0] = True
        return torch.where(picked, ids, IGNORED)


def noise(*shape: int) -> torch.Tensor:
    """Return fp32 noise of a shape: one sample's, repeated, for making it must not take longer than training on it."""
    one = torch.randn((1, *shape[1:]), generator=torch.Generator().manual_seed(SEED))
    return one.expand(shape).contiguous()


def special_ids(config: Any) -> frozenset[int]:
    """Return the ids that a config and its parts name: padding, end, image tokens and the like."""
    parts = [
        config,
        *(getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)),
    ]
    found = set()
    for part in parts:
        for key, value in vars(part).items():
            if key.endswith(("_token_id", "_token_index")):
                found |= {item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)}
    return frozenset(token for token in found if token >= 0)

"""The step in fp64, which every other one is held against.

Of large gradients a sample is kept, evenly spaced; sums over all parameters weigh each sample by what it stands for.

A parameter counts by itself where fp32 computes its gradient well and it is not next to nothing (`SMALL`). Both ends
are common in healthy models: the gradient of a key bias in attention is an exact zero by cancellation, those of queries
and keys nearly vanish as long as attention is uniform (DETR's decoder at its start: 3e-7 of the whole).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from floatline.audit.tolerance import Effect
from floatline.observe.error.measures import ILL, relative_error

SMALL = 1e-6
"""Share of the gradient's norm below which a parameter does not count by itself."""


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The step in fp64, on one batch.

    Attributes:
        value: Loss or outputs.
        gradients: Parameter -> a sample of its gradient, fp64.
        weights: Parameter -> elements that each sampled one stands for.
        fp32: Parameter -> relative error of its gradient in fp32.
        loss_fp32: Relative error of the value in fp32.
        gradient_fp32: Of the whole gradient.
    """

    value: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    weights: Mapping[str, float]
    fp32: Mapping[str, float]
    loss_fp32: float
    gradient_fp32: float = 0.0

    def sound(self, name: str) -> bool:
        """Say whether fp32 computes a parameter's gradient well."""
        return self.fp32.get(name, 0.0) <= ILL

    def counts(self, name: str) -> bool:
        """Say whether a parameter's gradient is more than next to nothing."""
        return self.shares.get(name, 1.0) >= SMALL

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """Parameter -> norm of its gradient in units of the whole gradient's; exact zeros are left out."""
        sizes = {name: float(g.square().sum()) * self.weights[name] for name, g in self.gradients.items()}
        total = sum(sizes.values())
        return {name: (size / total) ** 0.5 for name, size in sizes.items() if size}

    @cached_property
    def idle(self) -> frozenset[str]:
        """Modules with parameters of their own, of which no gradient counts."""
        by_module: dict[str, list[str]] = defaultdict(list)
        for name in self.gradients:
            by_module[name.rpartition(".")[0]].append(name)
        return frozenset(module for module, names in by_module.items() if not any(map(self.counts, names)))

    def effect(self, value: torch.Tensor, gradients: Mapping[str, torch.Tensor], policy: str, scale: float) -> Effect:
        """Hold a step against this one.

        Args:
            value: Its loss or outputs.
            gradients: Its gradients, unscaled and sampled alike.
            policy: Under which it ran.
            scale: Loss scale of it.
        """
        total = wrong = 0.0
        worst, name = 0.0, ""
        for key, exact in self.gradients.items():
            got = gradients.get(key)
            off = exact if got is None else got - exact
            size, error = float(exact.square().sum()), float(off.square().sum())
            total += size * self.weights[key]
            wrong += error * self.weights[key]
            if size and self.sound(key) and self.counts(key):  # what is exactly zero counts in the whole alone
                off_by = (error / size) ** 0.5
                if not off_by <= worst:
                    worst, name = off_by, key
        gradient = (wrong / total) ** 0.5 if total else (float("inf") if wrong else 0.0)
        clean = [x if x == x else float("inf") for x in (relative_error(value, self.value), gradient, worst)]
        return Effect(
            policy=policy,
            loss_error=clean[0],
            gradient_error=clean[1],
            tensor_error=clean[2],
            tensor=name,
            scale=scale,
        )

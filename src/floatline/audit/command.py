"""What `floatline audit` does, without what it prints: an `AuditRequest` becomes an `AuditReport`.

A request holds the command's options as the user gave them; a recipe is audited by train/audit_recipe.py, with the same
request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from floatline.audit.audit import audit
from floatline.audit.progress import Progress
from floatline.audit.report import AuditReport
from floatline.audit.settings import check_candidates, check_mode, check_seed
from floatline.audit.sources import AuditSource, load_audit_source
from floatline.audit.tolerance import Tolerance
from floatline.errors import ConfigError, did_you_mean
from floatline.hardware import resolve
from floatline.plan.command import quiet
from floatline.plan.shape import Shape

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
}
"""Optimizers by the name that `--optimizer` takes."""
LR = 1e-4
"""Learning rate where only the optimizer was named."""


@dataclass(frozen=True, kw_only=True)
class AuditRequest:
    """What is asked of `floatline audit`; the fields are its options.

    Args:
        model: As for `load_audit_source`, or a recipe's path.
        candidates: Lower formats, the preferred one first.
        mode: "mixed" or "true"; None is a recipe's own, else "mixed".
        hardware: Whose autocast lists hold.
        tolerance: Largest relative error of the gradient.
        shape: Sizes of the batch.
        task: As for `load_source`.
        backward: Also audit the backward.
        fp8: Also say which linear layers could multiply in fp8.
        repeats: Runs with stochastic rounding for each confidence.
        probes: Modules lowered alone; None for all.
        most_trials: Joint evaluations at most.
        optimizer: One of `OPTIMIZERS`; None where updates are not asked about.
        lr: Its learning rate.
        batches: Batches of a recipe's data.
        seed: Of what the model draws.

    Raises:
        ConfigError: An option out of range, or an unknown name.
    """

    model: str
    candidates: tuple[str, ...] = ("bf16", "fp16")
    mode: str | None = None
    hardware: str = "auto"
    tolerance: float | None = None
    shape: Shape = field(default_factory=Shape)
    task: str | None = None
    backward: bool = True
    fp8: bool = False
    repeats: int = 3
    probes: int | None = 12
    most_trials: int | None = None
    optimizer: str | None = None
    lr: float | None = None
    batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        if self.mode is not None:
            check_mode(self.mode)
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"unknown optimizer {self.optimizer!r}", hint=did_you_mean(self.optimizer, OPTIMIZERS))
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ConfigError(f"--lr {self.lr} is no learning rate", hint="give a number above 0, e.g. 1e-5")
        _check_counts(self)
        if not self.backward:
            given = {"--optimizer": self.optimizer, "--lr": self.lr, "--fp8": self.fp8}
            for option in (option for option, value in given.items() if value):
                raise ConfigError(f"{option} needs the backward", hint=f"leave out {option} or --forward-only")
        check_seed(self.seed)
        Tolerance.of(self.tolerance)
        resolve(self.hardware)

    @property
    def make_optimizer(self) -> Callable[[Any], torch.optim.Optimizer] | None:
        """Factory of the optimizer that was asked for; None where none was."""
        if self.optimizer is None and self.lr is None:
            return None
        kind: Any = OPTIMIZERS[self.optimizer or "adamw"]
        return lambda parameters: kind(parameters, lr=self.lr or LR)


def _check_counts(request: AuditRequest) -> None:
    least = {"repeats": 0, "probes": 0, "most_trials": 2, "batches": 1}
    for name, smallest in least.items():
        value = getattr(request, name)
        if value is not None and value < smallest:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} {value} is too few", hint=f"give {smallest} or more")


def parse_probes(text: str) -> int | None:
    """Read the number of modules that are lowered alone; "all" is None.

    >>> parse_probes("12"), parse_probes("all")
    (12, None)

    Raises:
        ConfigError: Neither.
    """
    if text.strip() == "all":
        return None
    if not text.strip().isdigit():
        raise ConfigError(f"--probes {text} is no number of modules", hint="give a count, or all")
    return int(text)


@quiet()
def answer(request: AuditRequest, progress: Progress = lambda what, done: None) -> AuditReport:
    """Audit what a request names.

    Args:
        request: The options.
        progress: Called before each forward pass.

    Raises:
        ConfigError: An option that cannot be, or that only a recipe takes.
        ModelError: A model that cannot be loaded or audited.
    """
    if request.batches != 1:
        raise ConfigError(
            f"--batches {request.batches} is for recipes, which have data", hint="a bare model has one random batch"
        )
    progress("loading the model", 0)
    return audit_source(request, load_audit_source(request.model, request.shape, task=request.task), progress)


def audit_source(request: AuditRequest, source: AuditSource, progress: Progress) -> AuditReport:
    """Audit a model that is built.

    Args:
        request: The options; its mode, if open, is "mixed".
        source: The model, its batch and its notes.
        progress: Called before each forward pass.
    """
    found = audit(
        source.model,
        source.batch,
        source.loss,
        request.candidates,
        request.tolerance,
        mode=request.mode or "mixed",
        hardware=request.hardware,
        optimizer=request.make_optimizer or source.optimizer,
        backward=request.backward,
        repeats=request.repeats,
        probes=request.probes,
        most_trials=request.most_trials,
        fp8=request.fp8,
        seed=request.seed,
        progress=progress,
    )
    return replace(found, model=source.name, notes=(*source.notes, *found.notes))

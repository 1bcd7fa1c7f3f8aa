"""The shape of a technique: applied from outside, returns what it touched, can be undone.

A technique is a frozen dataclass: its fields are its settings, its name is what recipes call it. `apply(model)` changes
the model in place and hands back an `Applied`: the dotted names that were touched, `undo`, and whatever the one step
must do differently (a context around the forward, another optimizer, a batch in parts). What a technique does to the
maths is declared: `exact` ones give the plain step's numbers bit for bit.

`TrainStep` applies techniques in the order of their `Stage`, whichever order they are given in, and undoes them in
reverse. Techniques that exclude each other say so in `conflicts`, with the reason and the way out.

A technique prints as the text that makes it: `checkpointing(every=2, keep='matmul')`.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from floatline.errors import ConfigError, FloatlineWarning
from floatline.hardware import Hardware, detect
from floatline.hardware import resolve as resolve_hardware
from floatline.hardware.legality import Verdict
from floatline.precision import Policy
from floatline.techniques.distributed.ranks import OneRank

MARK = "_floatline_techniques"
"""Attribute of a model that holds the techniques on it, by name."""


class Stage(IntEnum):
    """When a technique is applied; lower stages first."""

    FREEZE = 0
    ADAPT = 1
    ATTENTION = 2
    HEAD = 3
    PRECISION = 4
    RECOMPUTE = 5
    COMPILE = 6
    SHARD = 7
    SAVE = 8
    OPTIMIZER = 9
    BATCH = 10
    LAYOUT = 11  # how the rows of a micro-batch lie, once a batch was cut


def no_undo() -> None:
    """The undo of a technique that leaves the model as it is."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a technique did to a model, and what the step must do for it.

    Args:
        technique: The settings that were applied.
        touched: Dotted names of the modules or parameters it changed ("" is the whole model).
        undo: Takes the change back, exactly.
        notes: What was chosen automatically or could not be had, each with its reason.
        around: Context of the forward and loss of each micro-batch.
        during: Context of forward, loss and backward of each micro-batch, where recomputation happens too.
        update: Context of what follows an update's last backward: norm, clipping, the optimizer's step.
        split: One batch into micro-batches of one update; lists that the caller made are not split again.
        optimizer: Takes the optimizer and returns the one to use; their parameter groups must stay the same objects,
            so that learning-rate schedules go on working.
        ranks: The processes that train together.
        facts: Numbers that were counted so far (recompiles, bytes offloaded ...), for tables and reports.
    """

    technique: Technique
    touched: tuple[str, ...]
    undo: Callable[[], None] = no_undo
    notes: tuple[str, ...] = ()
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    update: Callable[[], AbstractContextManager[Any]] = nullcontext
    split: Callable[[Any], list[Any]] | None = None
    optimizer: Callable[[torch.optim.Optimizer], torch.optim.Optimizer] | None = None
    ranks: OneRank | None = None
    facts: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True, kw_only=True)
class Technique:
    """Base of the techniques. Subclasses are frozen keyword-only dataclasses that implement `_apply`.

    Attributes:
        name: The technique's name in recipes and tables.
        stage: When it is applied.
        order: Its place among the techniques of one stage; lower first.
        exact: True where loss, gradients and updates are bit for bit those of the plain step.
        conflicts: Name of another technique -> why they exclude each other, and what to do.

    Raises:
        ConfigError: A setting of the wrong type or out of range.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    order: ClassVar[int] = 0
    exact: ClassVar[bool] = False
    conflicts: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and get_origin(hints[field.name]) is tuple:
                value = [value]  # one pattern
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if not _fits(value, hints[field.name]):
                raise self.bad(field.name, f"allowed: {_spell(hints[field.name])}")

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        inner = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in changed)
        return f"{self.name}({inner})" if inner else self.name

    def bad(self, setting: str, hint: str) -> ConfigError:
        """Return the error for a setting that is not allowed."""
        return ConfigError(f"{self.name}.{setting} is {getattr(self, setting)!r}", hint=hint)

    def at_least(self, setting: str, smallest: float) -> None:
        """Raise unless a setting is None or at least `smallest`.

        Raises:
            ConfigError: It is smaller, or not a number.
        """
        value = getattr(self, setting)
        if value is not None and not value >= smallest:
            raise self.bad(setting, f"give {smallest} or more")

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        """Say whether this can be applied to `model` on `hardware`, with the reason when not."""
        return Verdict(True, f"{self.name} runs everywhere")

    def conflict_with(self, other: Technique) -> str | None:
        """Return why `other` cannot be combined with this one and what to do; None where it can."""
        return self.conflicts.get(other.name) or other.conflicts.get(self.name)

    def needs(self) -> Mapping[str, str]:
        """Return the techniques that must be there too, by name, each with the reason."""
        return {}

    def refuses(self, policy: Policy, max_grad_norm: float | None) -> str | None:
        """Return why this cannot run in a step of that precision and clipping, and what to do; None where it can."""
        return None

    def apply(self, model: nn.Module, hardware: Hardware | None = None, policy: Policy | None = None) -> Applied:
        """Apply to `model` in place.

        Args:
            model: Any module; its weights may be trained already.
            hardware: Whose rules apply; None is the device that the model is on.
            policy: The precision of the step that this is for, where there is one.

        Returns:
            What was touched, what the step must do, and the undo.

        Raises:
            ConfigError: It is on the model already, conflicts with one that is, the hardware or model cannot do it, or
                a pattern matches nothing.
        """
        present: dict[str, Technique] = getattr(model, MARK, {})
        if self.name in present:
            raise ConfigError(
                f"{self.name} is already applied to this {type(model).__name__}",
                hint="undo() the first before applying it with other settings",
            )
        for other in present.values():
            refuse_conflict(self, other)
        hardware = hardware or hardware_of(model)
        if not (verdict := self.supports(hardware, model)):
            raise ConfigError(f"{self} cannot be applied: {verdict.reason}", hint=f"leave {self.name} out")
        applied = self._apply(model, hardware) if policy is None else self._apply_in(policy, model, hardware)
        if not applied.touched:
            reason = "; ".join(applied.notes) or f"nothing in {type(model).__name__} is of the kind it changes"
            warnings.warn(f"{self} touched nothing: {reason}", FloatlineWarning, stacklevel=2)
        return _marked(applied, model)

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        raise NotImplementedError

    def _apply_in(self, policy: Policy, model: nn.Module, hardware: Hardware) -> Applied:
        """Apply in a step of that precision; most techniques do not mind which."""
        return self._apply(model, hardware)


def _marked(applied: Applied, model: nn.Module) -> Applied:
    """Note a technique on its model; its undo, which may be called again and then does nothing, takes the note off."""
    name = applied.technique.name
    setattr(model, MARK, {**getattr(model, MARK, {}), name: applied.technique})

    def undo() -> None:
        present = dict(getattr(model, MARK, {}))
        if present.pop(name, None) is None:
            return
        applied.undo()
        setattr(model, MARK, present)
        if not present:
            delattr(model, MARK)

    return replace(applied, undo=undo)


def refuse_conflict(one: Technique, other: Technique) -> None:
    """Raise if two techniques exclude each other.

    Raises:
        ConfigError: They do; it says why and what to do.
    """
    reason = one.conflict_with(other) or other.conflict_with(one)
    if reason:
        raise ConfigError(f"{one.name} and {other.name} cannot be combined: {reason}", hint="drop one of the two")


def hardware_of(model: nn.Module) -> Hardware:
    """Return the hardware that a model's parameters are on."""
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return detect() if device == "cuda" else resolve_hardware("cpu")


def _fits(value: Any, hint: Any) -> bool:
    """Say whether `value` is of a type as settings have them: literals, unions, tuples and plain types."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint) and type(value) in {type(allowed) for allowed in get_args(hint)}
    if origin in (Union, types.UnionType):
        return any(_fits(value, inner) for inner in get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if origin is not None:  # a mapping or callable: its maker checks it
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint in (None, type(None)) else isinstance(value, hint)


def _spell(hint: Any) -> str:
    """Return a type as a user reads it."""
    origin = get_origin(hint)
    if origin is Literal:
        return ", ".join(map(str, get_args(hint)))
    if origin in (Union, types.UnionType):
        return ", ".join(_spell(inner) for inner in get_args(hint))
    if origin is tuple:
        return f"a list of {_spell(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true, false", str: "text", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))

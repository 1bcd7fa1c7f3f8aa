"""Which optimizer updates are lost in a format, at this learning rate.

The real optimizer runs twice on the same elements with the same gradients: in fp64, and in the format the weights have
in training. What differs is what the format took away:

    swallowed                   stagnation  updates below half an ulp leave the bits as they were; the weights make
                                            less than 75 % of their way
    stalled second moment       stagnation  v does not follow: under beta2 = 0.999 it changes by 0.1 % an update, and
                                            half an ulp of bf16 is 0.2 to 0.4 %, so it never falls
    eps underflows              range       eps is 0 in the format of v (1e-8 in fp16): where v is 0 as well, the
                                            update is 0/0
    second moment underflows    range       v is 0 where it should not be, and the weights leave their way
    overflow                    range       weights or v are infinite or NaN

Each gradient is the given one times 1 + noise * a normal number, element by element, rounded to the weights' format for
both twins. With noise = 1 a sixth of them change sign, much as gradients of single batches do around their mean; noise
makes Adam's updates smaller than its learning rate. Gradients that are 0 stay 0.

The weights start as they are, and so does the state of an optimizer that exists; a factory's optimizer starts with
none. The second moment is watched in a run of its own: it starts where gradients of this size bring it in the long run,
and the gradients are halved, as they fall in training.

Not covered: momentum buffers that stall (a decay above 0.99), clipping, schedules, gradients that the backward has lost
already, optimizers that optimizer_twin.py names. What was not looked at is in the report, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from floatline.audit.optimizer_twin import Cut, cut_of, steps_elements_alone
from floatline.audit.random_numbers import seeded
from floatline.audit.update_report import UpdateReport, UpdateRow
from floatline.audit.update_run import UpdateRun, torch_dtype
from floatline.audit.user_code import user_code
from floatline.errors import ConfigError, did_you_mean

__all__ = ["UpdateReport", "UpdateRow", "audit_updates"]

FORMATS_OF_WEIGHTS = ("fp32", "bf16", "fp16")
WHOLE = 2**18
"""Elements of a parameter up to which it is stepped whole, where an optimizer mixes elements."""


def audit_updates(
    named_parameters: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    gradients: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer | Callable[[list[Any]], torch.optim.Optimizer],
    *,
    weights: str = "bf16",
    master: bool = False,
    steps: int = 50,
    sample: int = 4096,
    seed: int = 0,
    noise: float = 1.0,
) -> UpdateReport:
    """Run the optimizer in fp64 and in a format, and say which updates the format loses.

    Args:
        named_parameters: Name -> parameter, as `model.named_parameters()` gives them; any floating format.
        gradients: Name -> gradient, of the parameter's shape. Parameters without one are not looked at.
        optimizer: `callable(params)`, called with the parameters; or an optimizer that exists, whose settings and
            state are copied. Neither parameters nor optimizer nor torch's random numbers are changed.
        weights: Format of the weights in training: "fp32", "bf16" or "fp16".
        master: The optimizer steps fp32 copies of them.
        steps: Updates.
        sample: Elements of each parameter that are looked at.
        seed: Of the noise and of the choice of elements.
        noise: Standard deviation of a gradient over batches, as a share of the gradient.

    Returns:
        A row for each parameter, what was not looked at, and advice.

    Raises:
        ConfigError: A setting out of range, names or shapes that do not fit, values that are not finite already.

    >>> weight = torch.nn.Parameter(torch.full((64,), 1.0))
    >>> sgd = lambda params: torch.optim.SGD(params, lr=1e-4)
    >>> report = audit_updates({"w": weight}, {"w": torch.ones(64)}, sgd, weights="bf16", steps=5)
    >>> report.worst.name, report.worst.which
    ('w', 'swallowed')
    """
    _check_settings(weights, steps, sample, noise)
    named = dict(named_parameters)
    unseen, known = _sort_out(named, gradients)
    generator = torch.Generator().manual_seed(seed)
    real = _make_optimizer(optimizer, named)
    rows: list[UpdateRow] = []
    with seeded(seed, {p.device for p in known.values()}):  # torchao rounds with torch's own random numbers
        cuts = _choose(real, known, unseen, sample, generator)
        if cuts:
            run = UpdateRun(real, cuts, gradients, torch_dtype("fp32" if master else weights), steps, noise, seed)
            rows = run.rows(unseen)
    return UpdateReport(weights=weights, master=master, steps=steps, rows=tuple(rows), unseen=unseen)


def _check_settings(weights: str, steps: int, sample: int, noise: float) -> None:
    if weights not in FORMATS_OF_WEIGHTS:
        raise ConfigError(f"unknown format of weights {weights!r}", hint=did_you_mean(str(weights), FORMATS_OF_WEIGHTS))
    for name, value in (("steps", steps), ("sample", sample)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} is not a count", hint=f"give 1 or more, e.g. {name}=50")
    if not (math.isfinite(noise) and noise >= 0):
        raise ConfigError(f"noise={noise!r} is no standard deviation", hint="give 0 or more; 1 is usual")


def _sort_out(
    named: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Refuse what does not fit, and set aside what has no gradient."""
    for name in gradients:
        if name not in named:
            raise ConfigError(f"a gradient for {name!r}, which is no parameter", hint=did_you_mean(name, named))
    unseen: dict[str, str] = {}
    known: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        gradient = gradients.get(name)
        if gradient is None or gradient.is_sparse or not parameter.is_floating_point() or not parameter.numel():
            unseen[name] = _why_not(parameter, gradient)
            continue
        if gradient.shape != parameter.shape:
            raise ConfigError(
                f"the gradient of {name} has shape {tuple(gradient.shape)}, the parameter {tuple(parameter.shape)}",
                hint="take gradients from parameter.grad after a backward",
            )
        for what, tensor in (("parameter", parameter), ("gradient", gradient)):
            if not torch.isfinite(tensor).all():
                raise ConfigError(
                    f"{what} {name} holds NaN or infinity already", hint="find where it comes from: floatline diagnose"
                )
        known[name] = parameter
    if not known:
        raise ConfigError("no parameter has a gradient", hint="run loss.backward() and pass parameter.grad by name")
    return unseen, known


def _why_not(parameter: torch.Tensor, gradient: torch.Tensor | None) -> str:
    if gradient is None:
        return "no gradient"
    if gradient.is_sparse:
        return "its gradient is sparse"
    return "it has no elements" if not parameter.numel() else f"it holds {parameter.dtype}"


def _make_optimizer(optimizer: Any, named: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        with user_code("the optimizer factory", "", "it is called with the list of trainable parameters"):
            optimizer = optimizer([parameter for parameter in named.values() if parameter.requires_grad])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer factory returned a {type(optimizer).__name__}", hint="return a torch.optim.Optimizer"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in named.values()):
        raise ConfigError(
            f"{type(optimizer).__name__} steps none of these parameters",
            hint="pass the factory, callable(params), if it holds copies of them (master weights)",
        )
    return optimizer


def _choose(
    optimizer: torch.optim.Optimizer,
    known: Mapping[str, torch.Tensor],
    unseen: dict[str, str],
    sample: int,
    generator: torch.Generator,
) -> list[Cut]:
    """Choose elements of each parameter, or all of them where the optimizer mixes elements."""
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    alone: dict[tuple[int, int], bool | str] = {}
    cuts = []
    for name, parameter in known.items():
        if id(parameter) not in group_of:
            unseen[name] = "the optimizer does not step it"
            continue
        kind = group_of[id(parameter)], parameter.dim()
        if kind not in alone:
            alone[kind] = _try_alone(optimizer, parameter)
        answer = alone[kind]
        if isinstance(answer, str):
            unseen[name] = answer
        elif answer or parameter.numel() <= WHOLE:
            cuts.append(cut_of(name, parameter, sample if answer else parameter.numel(), generator))
        else:
            unseen[name] = f"{type(optimizer).__name__} mixes elements, and {parameter.numel():,} are too many to step"
    return cuts


def _try_alone(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> bool | str:
    """Ask whether elements are stepped one by one; an optimizer that cannot be run like that answers with why."""
    try:
        return steps_elements_alone(optimizer, parameter)
    except Exception as error:  # any optimizer, any error: it is told, not hidden
        return f"{type(optimizer).__name__} cannot be stepped alone: {type(error).__name__}: {error}"

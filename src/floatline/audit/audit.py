"""`fl.audit`: what must stay fp32, and the cheapest policy that is safe.

    report = fl.audit(model, batch, loss)
    print(report.policy)          # "bf16-mixed; layers.*.norm=32"
    report.rows                   # every op: which way it fails, by how much, where

For each candidate format the real step runs under the real policy (candidate.py), with a meter on every op
(observe/error). fp64 is the judge, and fp32 the measure of what can be asked.

What the audit sees is one step on the batches it is given. Not covered: errors that build up over many updates (of
weights, updates.py says which are lost), kernels that only the target has (it says which), compiled code (it runs
eager).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from floatline.audit.candidate import Lowering
from floatline.audit.exact import Exact
from floatline.audit.kernels import host_cannot_tell
from floatline.audit.lowered import Lowered
from floatline.audit.noise import noise_of
from floatline.audit.probes import probe
from floatline.audit.progress import Progress, ToldPasses
from floatline.audit.random_numbers import randomness
from floatline.audit.report import AuditReport, Candidate, Noise
from floatline.audit.rows import module_rows, rows_of
from floatline.audit.settings import NAMES, check_candidates, check_mode, check_runs, check_seed, check_subject
from floatline.audit.subject import Loss, Subject
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.update_report import UpdateReport
from floatline.audit.updates import audit_updates
from floatline.audit.user_code import UserCodeError
from floatline.audit.verdict import advice_of, choose, verdict
from floatline.errors import ConfigError, ModelError
from floatline.hardware import Hardware, format_verdict, resolve
from floatline.observe.finite import plain_name
from floatline.precision import Policy

Optimizer = torch.optim.Optimizer | Callable[[list[Any]], torch.optim.Optimizer]


@torch.inference_mode(False)  # where the caller has it on, copies would be without gradients
def audit(
    model: nn.Module,
    batch: Any,
    loss: Loss | None = None,
    candidates: Sequence[str] = ("bf16", "fp16"),
    tolerance: float | Tolerance | None = None,
    *,
    mode: str = "mixed",
    hardware: str | Hardware = "auto",
    optimizer: Optimizer | None = None,
    backward: bool = True,
    repeats: int = 3,
    probes: int | None = 12,
    most_trials: int | None = None,
    fp8: bool = False,
    seed: int = 0,
    progress: Progress = lambda what, done: None,
) -> AuditReport:
    """Audit a model's precision.

    Args:
        model: Any module with floating parameters; it is copied, and not changed.
        batch: dict -> `model(**batch)`, tuple -> `model(*batch)`, or a tensor; a list of batches to see how much the
            verdict hangs on one.
        loss: `(model, batch) -> tensor`; None takes the model's own loss, else its first floating output.
        candidates: Lower formats to try, the preferred one first.
        tolerance: Largest relative error of the gradient (0.1), others in proportion; or a `Tolerance`.
        mode: "mixed" for autocast over fp32 weights, "true" for weights that are cast.
        hardware: Whose autocast lists hold: "auto" is this machine; a GPU's name gives CUDA's on any host.
        optimizer: A factory or an optimizer: which of its updates are lost. None takes AdamW at a learning rate of
            1e-4 in mode "true".
        backward: Also audit the backward.
        repeats: Runs with stochastic rounding for each confidence.
        probes: Modules that are lowered one at a time at most, the most suspected ones; None for all.
        most_trials: Joint evaluations at most; None for as many as the search takes.
        fp8: Also say which linear layers could multiply in fp8.
        seed: Of what the model draws.
        progress: Called before each forward pass with what it is for and how many were run.

    Returns:
        The report.

    Raises:
        ConfigError: An unknown candidate, mode or hardware; a tolerance that is not positive.
        ModelError: There is nothing to audit: no floating parameters, no tensor in the output, no gradient; or the step
            is not finite in fp32 (see `fl.diagnose`).

    Example:
        >>> report = audit(nn.Linear(8, 4), torch.ones(2, 8), candidates=("bf16",), hardware="cpu")
        >>> report.policy
        'bf16-mixed'
    """
    started = time.perf_counter()
    check_subject(model, loss, optimizer)
    check_candidates(candidates)
    check_mode(mode)
    check_runs(repeats, probes, most_trials)
    check_seed(seed)
    candidates = tuple(dict.fromkeys(candidates))
    model = getattr(model, "_orig_mod", model)  # of torch.compile: it runs eager here
    allowed = Tolerance.of(tolerance)
    target = resolve(hardware)
    batches = batch if isinstance(batch, list) else [batch]
    if not batches:
        raise ConfigError("batch is an empty list", hint="give at least one batch")
    subject = Subject(model, batches, loss, target, backward, seed)
    subject.passes = ToldPasses(progress=progress)
    _look_for_randomness(subject)
    exacts = _exacts(subject)
    fp32 = _fp32(exacts[0])
    lowered, raised = _lowered(subject, exacts[0], candidates, mode, allowed, most_trials)
    updates = _updates(subject, model, candidates, mode, optimizer)
    made = {name: _that_does_not_run(name, mode, error) for name, error in raised.items()}
    rows, modules = [], []
    for lowering, low in lowered:
        alone = probe(subject, exacts[0], low, probes, allowed)
        sure = _confidences(subject, exacts, lowering, low, repeats)
        rows += rows_of(low)
        modules += module_rows(subject.model, low, alone, exacts[0], fp32, sure)
        made[low.name] = _candidate(subject, exacts, low, allowed, target, updates.get(low.name), repeats)
    made = {name: made[name] for name in candidates}
    policy = choose(made)
    rows.sort(key=lambda row: (row.failure is None, -row.severity))
    eights, eight_policy = _fp8(subject, made.get("bf16")) if fp8 else ((), "")
    return AuditReport(
        model=type(model).__name__,
        mode=mode,
        hardware=target.name,
        tolerance=allowed,
        rows=tuple(rows),
        modules=tuple(modules),
        candidates=made,
        policy=policy,
        verdict=verdict(policy, made, len(list(subject.model.modules())), rows, allowed),
        fp32=fp32,
        updates=updates,
        fp8=eights,
        fp8_policy=eight_policy,
        notes=(*subject.notes, *host_cannot_tell([low for _, low in lowered], target)),
        passes=dict(subject.passes.count),
        seconds=time.perf_counter() - started,
    )


def _look_for_randomness(subject: Subject) -> None:
    """Note it where the model draws random numbers in evaluation mode, or gives other results from run to run."""

    def run(seed: int) -> dict[str, torch.Tensor]:
        value = subject.plain(seed)
        if not value.numel():
            raise ModelError("the step gives no value: its output is empty", hint="give a batch with samples in it")
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                "the step is not finite in fp32 already", hint="find the first bad op with fl.diagnose(forward, model)"
            )
        return {"": value}

    note = randomness(run, subject.seed, "the model", " in evaluation mode (dropout that is always on?)")
    subject.notes += [note] if note else []


def _exacts(subject: Subject) -> list[Exact]:
    """Return the exact step of each batch."""
    exacts = [subject.exact(place) for place in range(len(subject.batches))]
    if not math.isfinite(exacts[0].gradient_fp32):
        raise ModelError(
            "the gradients are not finite in fp32 already",
            hint="find the first bad op with fl.diagnose(forward, model)",
        )
    return exacts


def _lowered(
    subject: Subject, exact: Exact, candidates: Sequence[str], mode: str, allowed: Tolerance, most_trials: int | None
) -> tuple[list[tuple[Lowering, Lowered]], dict[str, UserCodeError]]:
    """Audit each format; return those that run with what came of them, and what the others raise. One must run."""
    lowered, raised = [], {}
    for name in candidates:
        try:
            lowering = Lowering(subject, exact, name, mode, allowed, most_trials)
            lowered.append((lowering, lowering.run()))
        except UserCodeError as error:
            raised[name] = error
    if not lowered:
        raise next(iter(raised.values()))
    return lowered, raised


def _that_does_not_run(name: str, mode: str, error: UserCodeError) -> Candidate:
    """Return the candidate of a format in which the model raises."""
    base = NAMES[name][mode == "true"]
    return Candidate(
        name=name,
        base=base,
        policy=None,
        islands=(),
        all_lowered=Effect(policy=base, loss_error=math.inf, gradient_error=math.inf, tensor_error=math.inf),
        effect=None,
        noise=Noise(ratios=(math.inf,), confidence=1.0),
        noise_of_policy=None,
        cost=0.0,
        trials=(),
        front=(),
        reason=error.message,
        advice=(f"{base}: {error.hint}",),
    )


def _fp32(exact: Exact) -> Effect:
    sound = {name: error for name, error in exact.fp32.items() if error < 1.0}
    worst = max(sound, key=lambda name: sound[name], default="")
    return Effect(
        policy="32-true",
        loss_error=exact.loss_fp32,
        gradient_error=exact.gradient_fp32,
        tensor_error=sound.get(worst, 0.0),
        tensor=worst,
    )


def _candidate(
    subject: Subject,
    exacts: Sequence[Exact],
    low: Lowered,
    allowed: Tolerance,
    target: Hardware,
    updates: UpdateReport | None,
    repeats: int,
) -> Candidate:
    runs = format_verdict(target, low.name)
    refused = target.kind == "cuda" and not runs  # a CPU emulates what it lacks
    base = noise_of(subject, exacts, Policy.parse(low.base), low.all_lowered, allowed, repeats)
    own = None if low.policy is None else base
    if low.policy not in (None, low.base) and low.effect is not None:
        own = noise_of(subject, exacts, Policy.parse(str(low.policy)), low.effect, allowed, repeats)
    return Candidate(
        name=low.name,
        base=low.base,
        policy=low.policy,
        islands=tuple(sorted(low.islands or ())),
        all_lowered=low.all_lowered,
        effect=low.effect,
        noise=base,
        noise_of_policy=own,
        cost=sum(low.costs.get(name, 0.0) for name in low.islands or ()),
        trials=low.trials,
        front=low.front(),
        reason=low.reason,
        advice=advice_of(low, updates),
        illegal=runs.reason if refused else "",
        raising=tuple(low.raising),
    )


def _confidences(
    subject: Subject, exacts: Sequence[Exact], lowering: Lowering, low: Lowered, repeats: int
) -> dict[str, float]:
    """For each island: how often the policy without it is outside of the tolerance. What fails by itself is sure."""
    islands = low.islands or frozenset()
    sure = dict.fromkeys(islands & low.flagged, 1.0)
    rest = sorted(islands - low.flagged)
    for name in rest[:8]:
        without = lowering.policy(islands - {name}, low.lowered_again)
        effect = lowering.effect(islands - {name}, low.lowered_again)
        noise = noise_of(subject, exacts, without, effect, lowering.tolerance, repeats)
        sure[name] = sum(ratio > 1 for ratio in noise.ratios) / len(noise.ratios)
    return sure


def _updates(
    subject: Subject, model: nn.Module, candidates: Sequence[str], mode: str, optimizer: Optimizer | None
) -> dict[str, UpdateReport]:
    """Say which updates are lost, on weights of the format that they have in training."""
    if not subject.backward or (optimizer is None and mode == "mixed"):
        return {}
    if optimizer is None:
        subject.notes.append("no optimizer was given: AdamW with lr=1e-4 is taken for the audit of updates")
    given = optimizer if optimizer is not None else (lambda parameters: torch.optim.AdamW(parameters, lr=1e-4))
    gradients = subject.gradients()
    named = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    formats = {name: name if mode == "true" else "fp32" for name in candidates}
    by_format = {
        fmt: audit_updates(named, gradients, given, weights=fmt, master=fmt == "fp16") for fmt in set(formats.values())
    }
    return {name: by_format[fmt] for name, fmt in formats.items()}


def _fp8(subject: Subject, bf16: Candidate | None) -> tuple[Any, str]:
    """Say which layers could be fp8, and the policy for them; what must be fp32 under bf16's autocast stays fp32."""
    from floatline.audit.fp8 import fp8_policy, what_if

    with subject.fp32_step():
        rows = what_if(subject.model, subject.loss_once)
    beside = Policy.parse(bf16.policy) if bf16 is not None and bf16.policy and bf16.base == "bf16-mixed" else None
    return rows, fp8_policy(rows, subject.model, beside=beside)

"""`fl.audit_function`: which lines of a plain function of tensors must be fp32.

    report = fl.audit_function(texture, (image,), hardware="t4")
    print(report)                          # each output in fp32, bf16 and fp16; each op that fails, and where
    report.candidates["bf16"].lines        # the lines to keep in fp32

An image pipeline, a loss, a metric: code without modules, in which a person can change lines. So lines are what is
searched over (search.py). The function runs once in fp32 with fp64 shadows, then in each format with a meter on every
op; ops that fail by themselves make their lines fp32, and where the outputs still are not within the tolerance the
search looks for the cheapest lines that bring them there. What it finds has run jointly, with exactly these lines in
fp32 (fp32_lines.py).

An output is held to its relative RMSE, one of integers or booleans to the share that comes out otherwise (1 %). What
fp32 itself does not compute within the tolerance is nobody's fault: it is noted and not held against a format.

Not covered: several inputs sets at once (audit each), compiled functions (they run eager), tensors that the function
holds itself (a closure's filter bank) stay in their own format: pass them as inputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from floatline.audit.function_report import (
    FunctionCandidate,
    FunctionEffect,
    FunctionReport,
    OutputError,
    cell,
    percent,
    where,
)
from floatline.audit.kernels import host_cannot_tell
from floatline.audit.line_lowering import LineLowering, computed
from floatline.audit.outputs import output_error
from floatline.audit.program import Format, Program, Result
from floatline.audit.random_numbers import randomness
from floatline.audit.settings import check_candidates, check_mode, check_seed
from floatline.audit.user_code import user_code
from floatline.errors import ConfigError, ModelError
from floatline.hardware import Hardware, resolve

TOLERANCE = 0.02
"""Largest relative RMSE of an output."""


def audit_function(
    fn: Callable[..., Any],
    inputs: Any,
    candidates: Sequence[str] = ("bf16", "fp16"),
    tolerance: float | None = None,
    *,
    backward: bool | str = False,
    mode: str = "true",
    hardware: str | Hardware = "auto",
    seed: int = 0,
) -> FunctionReport:
    """Audit the precision of a function of tensors.

    Args:
        fn: Any callable that returns tensors, also nested; for modules there is `fl.audit`.
        inputs: A tuple, called as `fn(*inputs)`, or a dict, called as `fn(**inputs)`. Floating tensors are lowered;
            integers, booleans and all else pass as they are. They are not changed.
        candidates: Lower formats to try.
        tolerance: Largest relative RMSE of an output; None for 0.02.
        backward: Also audit the gradients of the floating inputs; "auto" where `fn` returns one floating scalar.
        mode: "true": inputs are cast, everything runs in the format. "mixed": autocast over fp32.
        hardware: Whose autocast lists hold: "auto" is this machine; a GPU's name gives CUDA's on any host.
        seed: Of what the function draws.

    Returns:
        The report.

    Raises:
        ConfigError: An unknown candidate, mode or hardware; a tolerance that is not positive; inputs without a floating
            tensor; `fn` is a module or cannot be called.
        ModelError: It raises, returns no tensors, or gives no gradient; or it is not finite in fp32 already (see
            `fl.diagnose`).

    Example:
        >>> report = audit_function(lambda x: x.softmax(-1), (torch.linspace(-4, 4, 64),), hardware="l4")
        >>> report.safe
        ('bf16', 'fp16')
    """
    started = time.perf_counter()
    _check(fn, candidates, mode, backward, tolerance)
    check_seed(seed)
    candidates = tuple(dict.fromkeys(candidates))
    allowed = TOLERANCE if tolerance is None else float(tolerance)
    target = resolve(hardware)
    name = getattr(fn, "__name__", type(fn).__name__)
    with user_code(name, "in fp32", "it has to run on these inputs before it can be audited"):
        program = Program(fn, inputs, target, backward, seed)
        note = randomness(program.plain, seed, name)
        truth = program.exact()
    notes = [note] if note else []
    fp32 = tuple(output_error(name, value, truth.exact[name]) for name, value in truth.values.items())
    _refuse_not_finite(truth, fp32, program.name)
    notes += _not_computed(fp32, allowed)
    lowerings = [
        LineLowering(program, truth, fp32, Format(name=name, mode=mode), allowed, bool(note)) for name in candidates
    ]
    made = {lowering.name: lowering.run(target) for lowering in lowerings}
    rows = [row for lowering in lowerings for row in lowering.rows(made[lowering.name])]
    rows.sort(key=lambda row: (row.failure is None, -row.severity))
    return FunctionReport(
        function=program.name,
        mode=mode,
        hardware=target.name,
        tolerance=allowed,
        fp32=fp32,
        rows=tuple(rows),
        candidates=made,
        verdict=" ".join(_sentence(candidate, mode) for candidate in made.values()),
        notes=(*notes, *host_cannot_tell(lowerings, target)),
        passes=dict(program.passes.count),
        seconds=time.perf_counter() - started,
    )


def _check(fn: Any, candidates: Any, mode: str, backward: Any, tolerance: Any) -> None:
    if isinstance(fn, nn.Module):
        raise ConfigError(f"fn is a module ({type(fn).__name__})", hint="audit a module with fl.audit(model, batch)")
    if not callable(fn):
        raise ConfigError(f"fn is a {type(fn).__name__}, which cannot be called", hint="pass a function of tensors")
    check_candidates(candidates)
    check_mode(mode)
    if not (isinstance(backward, bool) or backward == "auto"):
        raise ConfigError(f"backward={backward!r}", hint='allowed: True, False, "auto"')
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 < tolerance < math.inf):
        raise ConfigError(f"tolerance={tolerance!r} is no positive number", hint="write e.g. 0.01 for 1 %")


def _refuse_not_finite(truth: Result, errors: Sequence[OutputError], function: str) -> None:
    for error in errors:
        value = truth.values[error.name]
        if not value.is_floating_point():
            continue
        if bool(torch.isnan(value).any()) or not bool(torch.isfinite(value).any()) or math.isinf(error.largest):
            raise ModelError(
                f"{error.name} of {function} is not finite in fp32 already",
                hint="find the first bad op with fl.diagnose(lambda: fn(*inputs))",
            )


def _not_computed(fp32: Sequence[OutputError], allowed: float) -> list[str]:
    return [
        f"fp32 itself is too far off in {error.name} ({cell(error)}): it needs fp64 or another formula, and is not "
        "held against a format"
        for error in fp32
        if not computed(error, allowed)
    ]


def _sentence(candidate: FunctionCandidate, mode: str) -> str:
    base = f"{candidate.name}-{mode}"
    worst = _worst(candidate.all_lowered)
    if candidate.lines is None:
        text = f"{base} is not safe: {candidate.reason}"
    elif not candidate.lines:
        text = f"{base} is safe as it is: {worst}"
    else:
        names = ", ".join(where(place) for place in candidate.lines[:6]) + (", ..." if len(candidate.lines) > 6 else "")
        of = f"{len(candidate.lines)} of {candidate.audited} lines in fp32 ({names})"
        assert candidate.effect is not None
        text = f"{base} needs {of}: {worst} without and {_worst(candidate.effect)} with them"
    if candidate.illegal:
        text += f"; the target does not run it: {candidate.illegal}"
    return text + "."


def _worst(effect: FunctionEffect) -> str:
    """Return the worst output in words."""
    if effect.error:
        return "it does not run"
    floats = [error for error in effect.outputs if not error.decisions]
    decided = [error for error in effect.outputs if error.decisions]
    parts = []
    if floats:
        worst = max(floats, key=lambda error: error.relative)
        parts.append(f"{worst.name} is {percent(worst.relative)} off")
    if decided:
        worst = max(decided, key=lambda error: error.flipped / error.decisions)
        parts.append(f"{worst.flipped} of {worst.decisions} decisions of {worst.name} flip")
    return " and ".join(parts)

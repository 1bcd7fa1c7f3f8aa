"""What an audit says: a row for each op, what each module does to the step, and a policy for each candidate format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from floatline.audit.judging import Failure
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.trials import Trial
from floatline.audit.update_report import UpdateReport
from floatline.observe.error import Measure
from floatline.observe.finite.places import Place

if TYPE_CHECKING:
    from floatline.audit.fp8 import Fp8Row


@dataclass(frozen=True, kw_only=True)
class Row:
    """One op in one candidate format.

    Attributes:
        candidate: "bf16" or "fp16".
        module: Dotted name of the module whose forward runs it, "" at the top.
        op: aten name; in the backward that of the forward op whose derivative it is.
        ran: The aten op that ran: in the backward that of the derivative's formula.
        phase: "forward", "backward" or "buffer" (a running average that the forward writes).
        location: The user's line.
        failure: "range", "rounding", "stagnation", or None.
        severity: The worst number in units of its threshold.
        why: How it fails, in one sentence.
        measure: Error on exact inputs, range, and what has come together; None for mere decisions.
        stalled: Share of a running sum's increments that are lost.
        flipped: Decisions that come out otherwise.
        decisions: Decisions in all.
        calls: How often it ran.
        kept: The candidate's policy keeps its module in fp32.
    """

    candidate: str
    module: str
    op: str
    ran: str
    phase: str
    location: Place | None
    failure: Failure | None
    severity: float
    why: str
    measure: Measure | None
    stalled: float | None = None
    flipped: int = 0
    decisions: int = 0
    calls: int = 1
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class ModuleRow:
    """One module in one candidate format: what it does alone, and what lowering only it does to the step.

    Attributes:
        candidate: "bf16" or "fp16".
        module: Dotted name.
        failure: The gravest failure among its own ops.
        local: Largest relative error of its own forward ops on exact inputs.
        local_backward: The same of the backward's.
        reached: Relative error of its results in the step that is lowered throughout.
        weight_gradient: Largest relative error of its own parameters' gradients there; None without parameters.
        input_gradient: The same of the gradients of its inputs; None where they take none.
        headroom: Bits to the format's end, the least of its ops.
        loss_change: Relative change of the loss when only this module is lowered; None where that was not run.
        gradient_change: The same of the gradient.
        cost: Share of the step's FLOPs that are inside of it.
        kept: The candidate's policy keeps it in fp32.
        confidence: That it is needed, 0 to 1: share of steps with stochastic rounding in which the policy without it
            is outside of the tolerance; None for what is not kept.
    """

    candidate: str
    module: str
    failure: Failure | None
    local: float
    local_backward: float
    reached: float
    weight_gradient: float | None
    input_gradient: float | None = None
    headroom: float
    loss_change: float | None = None
    gradient_change: float | None = None
    cost: float = 0.0
    kept: bool = False
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The step's error under stochastic rounding and over the batches, in units of the tolerance.

    Attributes:
        ratios: Worst error over tolerance, run by run.
        confidence: That the verdict on the policy (within or outside) is no accident of rounding: share of the runs
            that say the same.
    """

    ratios: tuple[float, ...]
    confidence: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One lower format.

    Attributes:
        name: "bf16" or "fp16".
        base: The policy without rules.
        policy: The cheapest one that is within the tolerance; None where none is.
        islands: Modules that it keeps in fp32.
        all_lowered: Effect of the base.
        effect: Effect of the policy, jointly.
        noise: Of the base.
        noise_of_policy: Of the policy.
        cost: Share of the step's FLOPs in fp32 islands.
        trials: Effects of all policies that were tried jointly, in order; none where the model raises in the format.
        front: Those that no other beats in cost and error.
        reason: Why these islands, or what the model raises.
        advice: What no policy can do: lines to change, the optimizer.
        illegal: Why the hardware does not run it; empty where it does.
        raising: Modules that raise in the format.
    """

    name: str
    base: str
    policy: str | None
    islands: tuple[str, ...]
    all_lowered: Effect
    effect: Effect | None
    noise: Noise
    noise_of_policy: Noise | None
    cost: float
    trials: tuple[Effect, ...]
    front: tuple[Trial, ...]
    reason: str
    advice: tuple[str, ...] = ()
    illegal: str = ""
    raising: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The audit of a model.

    Attributes:
        model: Its class; from the command line what the user called it.
        mode: "mixed" or "true".
        hardware: Name of the target.
        tolerance: What was allowed.
        rows: Every op that has to do with a candidate format, the gravest first.
        modules: The same by module, in the model's order.
        candidates: By name.
        policy: The cheapest safe policy of all candidates that the target runs; "32-true" where none is safe.
        verdict: One paragraph.
        fp32: Effect of fp32 itself against fp64.
        updates: Optimizer updates that are lost, by candidate.
        fp8: Linear layers in fp8, where that was asked for.
        fp8_policy: The policy for them.
        notes: What a reader should know: random models, what the host cannot tell.
        passes: Forward passes by purpose.
        seconds: Time of the audit.
    """

    model: str
    mode: str
    hardware: str
    tolerance: Tolerance
    rows: tuple[Row, ...]
    modules: tuple[ModuleRow, ...]
    candidates: Mapping[str, Candidate]
    policy: str
    verdict: str
    fp32: Effect
    updates: Mapping[str, UpdateReport] = field(default_factory=dict)
    fp8: tuple[Fp8Row, ...] = ()
    fp8_policy: str = ""
    notes: tuple[str, ...] = ()
    passes: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failures(self) -> tuple[Row, ...]:
        """The ops that fail, the gravest first."""
        return tuple(row for row in self.rows if row.failure is not None)

    @property
    def forward_passes(self) -> int:
        """Forward passes in all."""
        return sum(self.passes.values())

    @property
    def safe(self) -> bool:
        """Whether any lower format can be used."""
        return any(candidate.policy is not None and not candidate.illegal for candidate in self.candidates.values())

    def fsdp_policy(self) -> dict[str, Any]:
        """Return the policy for FSDP2: module name -> `torch.distributed.fsdp.MixedPrecisionPolicy`, the root last.

        FSDP lowers whole modules, without autocast; mode "true" audits that.

        Example:
            >>> import floatline as fl, torch
            >>> model, batch = torch.nn.Linear(8, 4), torch.ones(2, 8)
            >>> report = fl.audit(model, batch, candidates=("bf16",), hardware="cpu", mode="true")
            >>> for name, mixed in report.fsdp_policy().items():
            ...     print(repr(name), mixed.param_dtype, mixed.reduce_dtype)  # fully_shard(module, mp_policy=mixed)
            '' torch.bfloat16 torch.float32
        """
        from floatline.audit.exports import fsdp_policy

        return fsdp_policy(self)

    def float8_filter(self, scaling: str = "tensor") -> Callable[[Any, str], bool]:
        """Return the `module_filter_fn` for torchao's `convert_to_float8_training`: (module, name) -> bool.

        Args:
            scaling: "tensor" or "row", as the recipe given to torchao.

        Raises:
            ConfigError: The audit was made without `fp8=True`, or no such scaling.
        """
        from floatline.audit.exports import float8_filter

        return float8_filter(self, scaling)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is infinite is the text "inf"."""
        tree = asdict(self)
        for told, row in zip(tree["rows"], self.rows):
            if row.measure is not None:
                told["measure"]["ulps"] = row.measure.ulps
        tree["failures"] = len(self.failures)
        tree["forward_passes"] = self.forward_passes
        tree["fp8"] = [row.to_dict() for row in self.fp8]
        tree["safe"] = self.safe
        tree["updates"] = {name: report.as_dict() for name, report in self.updates.items()}
        return plain(tree)

    def __str__(self) -> str:
        lines = [self.verdict]
        lines += [f"  {row.candidate} {row.failure}: {row.module or 'top'} {row.op} ({row.phase}): {row.why}"
                  for row in self.failures[:10]]  # fmt: skip
        return "\n".join(lines)


def plain(value: Any) -> Any:
    """Return a tree of what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

"""An audit's answer with invented round figures, so that what is printed does not move when audits improve."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from floatline.audit.fp8 import Fp8Row
from floatline.audit.fp8_row import ProductError
from floatline.audit.movement import Movement
from floatline.audit.report import AuditReport, Candidate, ModuleRow, Noise, Row
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.trials import Outcome, Trial
from floatline.audit.update_report import UpdateReport, UpdateRow
from floatline.observe.error import Measure
from floatline.observe.finite.places import Place

NORMS = tuple(f"layers.{n}.norm" for n in range(3))


def measure(**changes: Any) -> Measure:
    plain: dict[str, Any] = {"format": "bf16", "numel": 64, "error": 0.003, "error_fp32": 1e-7, "overflow": 0.0,
                             "underflow": 0.0, "underflow_error": 0.0, "subnormal": 0.0, "headroom": 120.0,
                             "reached": 0.01}  # fmt: skip
    return Measure(**(plain | changes))


def row(module: str, op: str = "native_layer_norm", **changes: Any) -> Row:
    plain: dict[str, Any] = {"candidate": "bf16", "module": module, "op": op, "ran": op, "phase": "backward",
                             "location": Place("/home/u/net/model.py", 12, "x = self.norm(x)", "forward"),
                             "failure": "rounding", "severity": 3.0,
                             "why": "exact inputs give a result that is 30 % off; in fp32 1.0e-07",
                             "measure": measure(error=0.3), "kept": True}  # fmt: skip
    return Row(**(plain | changes))


def module_row(module: str, **changes: Any) -> ModuleRow:
    plain: dict[str, Any] = {"candidate": "bf16", "module": module, "failure": None, "local": 0.002,
                             "local_backward": 0.003, "reached": 0.01, "weight_gradient": 0.01, "headroom": 120.0,
                             "loss_change": 1e-4, "gradient_change": 0.02, "cost": 0.1}  # fmt: skip
    return ModuleRow(**(plain | changes))


def effect(gradient: float, policy: str = "bf16-mixed") -> Effect:
    return Effect(policy=policy, loss_error=gradient / 10, gradient_error=gradient, tensor_error=gradient * 2,
                  tensor="head.weight")  # fmt: skip


def candidate(**changes: Any) -> Candidate:
    policy = "bf16-mixed; layers.*.norm=32; count=32"
    plain: dict[str, Any] = {
        "name": "bf16", "base": "bf16-mixed", "policy": policy, "islands": ("count", *NORMS),
        "all_lowered": effect(0.4), "effect": effect(0.02, policy), "noise": Noise(ratios=(4.0, 5.0), confidence=0.9),
        "noise_of_policy": Noise(ratios=(0.2, 0.3), confidence=0.8), "cost": 0.03, "reason": "4 fail by themselves",
        "trials": (effect(0.4), effect(0.05), effect(0.02, policy)),
        "front": (Trial(islands=frozenset(), outcome=Outcome(passes=True, error=0.5), cost=0.0),
                  Trial(islands=frozenset({"head"}), outcome=Outcome(passes=True, error=0.1), cost=0.1)),
        "advice": ("add at /home/u/net/model.py:40 is in no module that a policy can name",),
    }  # fmt: skip
    return Candidate(**(plain | changes))


def unsafe() -> Candidate:
    """fp16 overflows, whatever is kept."""
    lost = Effect(policy="16-mixed", loss_error=math.inf, gradient_error=math.inf, tensor_error=math.inf)
    return candidate(
        name="fp16", base="16-mixed", policy=None, islands=(), all_lowered=lost, effect=None, noise_of_policy=None,
        cost=0.0, reason="not even with all of its modules in fp32 is the step within the tolerance", front=(),
        advice=(),
    )  # fmt: skip


def update(name: str, progress: float | None, found: tuple[Any, ...] = ()) -> UpdateRow:
    moved = Movement(swallowed=0.9, progress=progress, ratio=0.1, error=0.9, noise=0.01)
    return UpdateRow(name=name, elements=64, lr=1e-5, weights=moved, state_format="bf16", found=found)


def updates(*rows: UpdateRow, weights: str = "fp32") -> UpdateReport:
    return UpdateReport(weights=weights, master=False, steps=50, rows=rows, unseen={})


def fp8_row(name: str, total: float) -> Fp8Row:
    error = ProductError(total=total, median=total)
    products = {"output": error, "input gradient": error, "weight gradient": error}
    return Fp8Row(
        name=name, in_features=32, out_features=32, tokens=8, flops=100, flops_share=0.25,
        errors={scheme: dict(products) for scheme in ("bf16", "tensor", "row", "block")}, operands={},
        impossible="" if total < 1 else "odd dims: 4 outputs",
    )  # fmt: skip


def report(**changes: Any) -> AuditReport:
    """A model in which three norms and a running sum fail in bf16, and everything in fp16."""
    norms = [row(name, severity=3.0 - n / 10) for n, name in enumerate(NORMS)]
    stalled = row("count", "cumsum", phase="forward", failure="stagnation", stalled=0.37,
                  why="37 % of the increments are lost", measure=measure(error=0.001))  # fmt: skip
    overflow = row("big", "addmm", candidate="fp16", phase="forward", failure="range", severity=math.inf, kept=False,
                   why="values reach 9.71e+05, fp16 ends at 65504",
                   measure=measure(format="fp16", error=math.inf, headroom=-3.9, overflow=0.8))  # fmt: skip
    lost = update("head.bias", 0.01, ("swallowed",))
    modules = [module_row("", cost=1.0, loss_change=None, gradient_change=None)]
    for n, name in enumerate(NORMS):
        modules += [module_row(name, failure="rounding", local_backward=0.3, kept=True, confidence=1.0, cost=0.01),
                    module_row(f"layers.{n}.up")]  # fmt: skip
    modules += [module_row("count", failure="stagnation", kept=True, confidence=1.0, cost=0.0), module_row("head"),
                module_row("big", candidate="fp16", failure="range", local=math.inf, reached=math.inf, headroom=-3.9,
                           loss_change=math.inf, gradient_change=math.inf)]  # fmt: skip
    made = AuditReport(
        model="net",
        mode="mixed",
        hardware="t4",
        tolerance=Tolerance(),
        rows=(overflow, *norms, stalled, row("layers.0.up", "addmm", failure=None, severity=0.2, kept=False)),
        modules=tuple(modules),
        candidates={"bf16": candidate(), "fp16": unsafe()},
        policy="bf16-mixed; layers.*.norm=32; count=32",
        verdict="bf16-mixed needs 4 of 12 modules in fp32. Use bf16-mixed; layers.*.norm=32; count=32.",
        fp32=Effect(policy="32-true", loss_error=1e-7, gradient_error=2e-7),
        updates={"bf16": updates(lost, update("up.weight", 0.99)), "fp16": updates(lost, update("up.weight", 0.99))},
        fp8=(fp8_row("layers.0.up", 0.03), fp8_row("layers.1.up", 0.03), fp8_row("head", 2.0)),
        fp8_policy="fp8-mixed",
        notes=("audited on a CPU, by CUDA's autocast lists for t4",),
        passes={"exact": 1, "joint": 6, "probes": 12},
        seconds=4.2,
    )
    return replace(made, **changes)


def hopeless() -> AuditReport:
    """No lower format is safe."""
    return report(candidates={"fp16": unsafe()}, policy="32-true", verdict="Stay in fp32: 32-true.", updates={}, fp8=())

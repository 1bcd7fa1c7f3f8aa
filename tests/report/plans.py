"""Answers of the planner with invented round figures, so that what is printed does not move when estimates improve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from floatline.hardware import Hardware, lookup
from floatline.plan.advice import Advice
from floatline.plan.command import PlanReport
from floatline.plan.estimate import Estimate
from floatline.plan.fit import fit_of
from floatline.plan.ladder import Rejected, Rung
from floatline.plan.largest import Largest
from floatline.plan.plan import Plan
from floatline.plan.probe import Probe
from floatline.plan.roofline import UpdateTime
from floatline.plan.shape import Shape, SizeChoice
from floatline.plan.side_by_side import Comparison, Row
from floatline.plan.sources import Source
from floatline.plan.timeline import Timeline
from floatline.step import Workload

GIB = 2**30
SHARES = {"parameters": 0.2, "optimizer state": 0.4, "gradients": 0.1, "activations": 0.25, "logits": 0.05}


def timeline(total: int, *, module: str = "model.layers.3.mlp") -> Timeline:
    """Activations rise and fall again; everything else lies flat."""
    course = [0.2, 0.6, 1.0, 0.5, 0.0]
    curves = {}
    for name, share in SHARES.items():
        rises = name in ("activations", "logits")
        curves[name] = tuple(int(share * total * (part if rises else 1)) for part in course)
    return Timeline(
        points=tuple(range(5)),
        curves=curves,
        phases=(("forward", 0), ("backward", 2), ("optimizer", 4)),
        peak=2,
        peak_bytes=sum(curve[2] for curve in curves.values()),
        op="aten.mm",
        module=module,
        phase="backward",
        largest=((module, "aten.mm", "activations", total // 8), ("", "aten.empty", "parameters", total // 16)),
    )


def estimate(gib: float, hardware: Hardware, techniques: tuple[str, ...] = (), **changes: Any) -> Estimate:
    """An estimate whose peak, context included, is so many GiB."""
    total = int(gib * GIB)
    held = total - hardware.context
    tensors = int(0.9 * held)
    line = changes.pop("timeline", None) or timeline(tensors)
    made = Estimate(
        hardware=hardware,
        precision="16-mixed",
        techniques=techniques,
        mode="train",
        peak_allocated=tensors,
        peak_reserved=held,
        peak_total=total,
        context=hardware.context,
        workspaces=16 * 2**20,
        categories=line.at_peak,
        states={"parameters": GIB},
        host_peak=0,
        timeline=line,
        fit=fit_of(total, int(0.7 * tensors), hardware),
        time=UpdateTime(seconds=0.5, compute=0.4, memory=0.1, launch=0.0, bus=0.0),
        flops=10**12,
        micro_batches=4 if any("accumulation" in text for text in techniques) else 1,
        assumptions=("time is a roofline model",),
        notes=(),
    )
    return replace(made, **changes)


def source() -> Source:
    return Source(
        name="tiny-gpt",
        kind="causal-lm",
        work=Workload(model=nn.Linear(1, 1), batch=(torch.ones(1),)),
        shape=Shape(batch=32, seq=1024),
        origin="tiny-gpt/config.json",
        task="causal-lm",
        choices=(SizeChoice("seq", 1024, "the longest it takes (n_positions)"),),
        notes=("sequences are full-length without padding, so no attention_mask is passed",),
        facts={"tokens": 1024},
        lay_out=lambda shape: source(),
        count=lambda: 124_000_000,
    )


def probe() -> Probe:
    return Probe(model="GPT2LMHeadModel", parameters=124_000_000, trainable=124_000_000, layers=12, rows=32,
                 optimizer="AdamW", adam=True, eager=False, attention_note="")  # fmt: skip


def plan(hardware: Hardware, final: float, advice: tuple[Advice, ...] = ()) -> Plan:
    """Chunked loss, which saves nothing here, accumulation, and fewer micro-batches in the end."""
    cut = "accumulation(micro_batches=4)"
    bottom = estimate(final + 12, hardware)
    chunked = estimate(final + 12, hardware, ("chunked_loss",))
    small = estimate(final - 4, hardware, ("accumulation(micro_batches=32)",))
    last = estimate(final, hardware, (cut,), time=replace(bottom.time, seconds=0.525))
    return Plan(
        hardware=hardware,
        precision="16-mixed",
        precision_reason="t4 is Turing: no bf16 units",
        techniques=(cut,),
        estimate=last,
        ladder=(
            Rung(added="", estimate=bottom, saved=0, slowdown=1.0),
            Rung(added="chunked_loss", estimate=chunked, saved=0, slowdown=1.02, kept=False),
            Rung(added="accumulation(micro_batches=32)", estimate=small, saved=16 * GIB, slowdown=1.31),
        ),
        rejected=(
            Rejected(name="chunked_loss", reason="saves 0 MiB here"),
            Rejected(name="offload", reason="not needed, the run fits without it"),
            Rejected(name="checkpointing", reason="not needed, the run fits without it"),
        ),
        advice=advice,
        probe=probe(),
        trials=7,
    )


def report(final: float = 10.0, **changes: Any) -> PlanReport:
    """A plan for a T4 that needs `final` GiB."""
    gpu = lookup("t4")
    pieces = (Advice(kind="gpu", text="l4 in bf16-mixed", techniques=("checkpointing",), needed=20 * GIB,
                     capacity=22 * GIB),) if final > 14 else ()  # fmt: skip
    decided = plan(gpu, final, pieces)
    columns = {
        ("inference", "32-true"): estimate(2, gpu),
        ("inference", "16-true"): estimate(1.2, gpu),
        ("train", "32-true"): estimate(30, gpu, fit=fit_of(29 * GIB, 8 * GIB, gpu)),
        ("train", "16-mixed"): estimate(14.2, gpu),
    }
    made = PlanReport(
        source=source(),
        hardware=gpu,
        estimate=decided.estimate,
        precision_reason=decided.precision_reason,
        plan=decided,
        table=columns,
        largest=(Largest(key="batch", value=12, needed=14 * GIB, peak_total=15 * GIB, limited_by="memory"),
                 Largest(key="seq", value=1024, needed=10 * GIB, peak_total=10 * GIB, limited_by="model")),
        settings={"trainer": {"fp16": True, "gradient_accumulation_steps": 4}},
    )  # fmt: skip
    return replace(made, **changes)


def comparison() -> Comparison:
    t4, l4, h200 = lookup("t4"), lookup("l4"), lookup("h200")
    return Comparison(
        source=source(),
        rows=(
            Row(hardware=t4, refused="bf16-mixed cannot run on t4: Turing"),
            Row(hardware=l4, plan=plan(l4, 25)),
            Row(hardware=h200, plan=plan(h200, 20)),
        ),
    )

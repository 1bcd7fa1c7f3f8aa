"""A common guide's memory tables for Qwen3-VL-2B and one image of 1024 x 1024, beside what the planner says.

    python benchmarks/guide_tables.py --json benchmarks/results/guide_tables_DATE.json

Prints markdown: the components, the ladder, the batch sizes that the guide expects, and plans for a T4 and an A100 with
40 GB. The guide's figures are arithmetic (GUIDE); ours are estimates on fake tensors, so any machine prints the same.
GB are 10^9 bytes, as in the guide. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clean_process import Failed, in_clean_process
from common import progress, report

PACKAGES = ("floatline", "torch", "transformers", "peft", "torchao")
MODEL, GB = "qwen3-vl-2b", 10**9
T4, A100 = "t4", "a100-40gb"
VISION = "freezing(modules='model.visual', keep='model.visual.merger')"
ADAPTERS = "lora(rank=64, alpha=128)"

GUIDE = {
    "components": {
        "weights": (9.6, 4.8),
        "gradients": (9.6, 4.8),
        "optimizer state": (19.2, 9.6),
        "activations": (14, 7),
        "inputs": (0.64, 0.32),
        "context and allocator": (0.5, 0.5),
        "total, training": (53.54, 27.3),
        "total, inference": (24.1, 12.3),
    },
    "ladder": (26.2, 21.3, 20.9, 7.3),
}
"""Component -> GB in fp32 and in bf16; the guide's "inputs" are a texture array of 40 channels that its model adds."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One estimate: Qwen3-VL-2B with an image a sample."""

    hardware: str
    precision: str
    techniques: tuple[str, ...] = ()
    mode: str = "train"
    batch: int = 1


COLUMNS = {
    "fp32": Ask(hardware=A100, precision="32-true"),
    "pure bf16 (A100)": Ask(hardware=A100, precision="bf16-true"),
    "bf16 autocast (A100)": Ask(hardware=A100, precision="bf16-mixed"),
    "fp16 autocast (T4)": Ask(hardware=T4, precision="16-mixed"),
}
INFERENCE = {
    "fp32": Ask(hardware=A100, precision="32-true", mode="inference"),
    "pure bf16 (A100)": Ask(hardware=A100, precision="bf16-true", mode="inference"),
    "fp16 autocast (T4)": Ask(hardware=T4, precision="16-true", mode="inference"),
}
PLAIN, THRIFTY = "attention(kernel='math')", ("checkpointing", "chunked_loss")
LADDER = {
    "one image at a time": (PLAIN,),
    "+ checkpointing": (PLAIN, "checkpointing"),
    "+ flash attention": ("checkpointing",),
    "frozen base, LoRA of rank 64": ("checkpointing", ADAPTERS),
}
BATCHES = {
    "T4, inference, 1-2": Ask(hardware=T4, precision="16-true", mode="inference", batch=2),
    "T4, frozen base, 1": Ask(hardware=T4, precision="16-true", techniques=("checkpointing", ADAPTERS)),
    "A100-40, inference, 8-16": Ask(hardware=A100, precision="bf16-true", mode="inference", batch=16),
    "A100-40, full, 4-8: 4": Ask(hardware=A100, precision="bf16-true", techniques=THRIFTY, batch=4),
    "A100-40, full, 4-8: 8": Ask(hardware=A100, precision="bf16-true", techniques=THRIFTY, batch=8),
    "A100-40, frozen base, 16-32: 16": Ask(
        hardware=A100, precision="bf16-true", techniques=(*THRIFTY, ADAPTERS), batch=16
    ),
    "A100-40, frozen base, 16-32: 32": Ask(
        hardware=A100, precision="bf16-true", techniques=(*THRIFTY, ADAPTERS), batch=32
    ),
}
PLANS = [
    (T4, "all of it", "16-mixed", ()),
    (T4, "all of it", "16-true", ()),
    (T4, "vision frozen, merger and text trained", "16-true", (VISION,)),
    (T4, "LoRA of rank 64 on a frozen base", "16-true", (ADAPTERS,)),
    (A100, "all of it", "bf16-mixed", ()),
    (A100, "all of it", "bf16-true", ()),
    (A100, "all of it", "bf16-true", ("kahan",)),
    (A100, "vision frozen, merger and text trained", "bf16-mixed", (VISION,)),
    (A100, "LoRA of rank 64 on a frozen base", "bf16-true", (ADAPTERS,)),
]
"""(GPU, what is trained, precision, techniques that are given)."""


# ---------------------------------------------------------------------------------------------------------------------
# Estimates and plans, each in a process of its own


def work_of(batch: int) -> Any:
    from floatline.plan.shape import Shape
    from floatline.plan.sources import load_source

    return load_source(MODEL, Shape(batch=batch, image=(1024, 1024))).work


def estimated(ask: Ask) -> dict[str, Any]:
    """Return an estimate and its components as plain values."""
    import torch

    from floatline import estimate
    from floatline.plan.table import components

    torch.set_num_threads(1)
    found = estimate(
        work_of(ask.batch), ask.hardware, ask.precision, ask.techniques, ask.mode,
        max_grad_norm=None if "optimizer_in_backward" in ask.techniques else 1.0, quick=True,
    )  # fmt: skip
    return {**found.as_dict(), "components": components(found)}


def planned(index: int) -> dict[str, Any]:
    import torch

    import floatline as fl

    torch.set_num_threads(1)
    hardware, _, precision, techniques = PLANS[index]
    plan = fl.plan(work_of(1), hardware, precision=precision, techniques=techniques, advice=False)
    slowdown = plan.estimate.time.seconds / plan.ladder[0].estimate.time.seconds
    return {**plan.as_dict(), "slowdown": slowdown}


def attempt(function: Callable[..., Any], given: Any, limit: float) -> dict[str, Any]:
    progress(str(given))
    try:
        return in_clean_process(function, given, limit=limit)  # type: ignore[no-any-return]
    except Failed as error:
        return {"failure": str(error)}


# ---------------------------------------------------------------------------------------------------------------------
# Markdown


def table(header: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def gb(nbytes: float) -> str:
    return f"{nbytes / GB:.1f}"


def print_components(found: dict[str, dict[str, Any]], inference: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, (fp32, bf16) in GUIDE["components"].items():  # type: ignore[attr-defined]
        ours = {column: _cell(name, column, found, inference) for column in COLUMNS}
        rows.append([name, f"{fp32:g}", ours["fp32"], f"{bf16:g}", *list(ours.values())[1:]])
    extra = [
        gb(found[column]["components"]["temporaries"]) if "components" in found[column] else "-" for column in COLUMNS
    ]
    rows.insert(5, ["temporaries at the peak", "-", extra[0], "-", *extra[1:]])
    names = list(COLUMNS)
    table(["GB", "guide, fp32", "ours, fp32", "guide, bf16", *(f"ours, {name}" for name in names[1:])], rows)


def _cell(name: str, column: str, found: dict[str, Any], inference: dict[str, Any]) -> str:
    if name == "total, inference":
        return gb(inference[column]["peak_total"]) if "peak_total" in inference.get(column, {}) else "-"
    if "components" not in found[column]:
        return "-"
    if name == "total, training":
        return gb(found[column]["peak_total"])
    parts = found[column]["components"]
    return gb(parts["allocator"] + parts["context"] if name == "context and allocator" else parts[name])


def print_ladder(rungs: list[dict[str, Any]], on_t4: dict[str, Any]) -> None:
    rows = []
    for (name, techniques), guide, found in zip(LADDER.items(), GUIDE["ladder"], rungs, strict=True):
        rows.append([name, f"`{' + '.join(techniques)}`", f"{guide:g}", *_verdict(found)])
    rows.append(["the last on a T4, fp16", f"`{' + '.join(list(LADDER.values())[-1])}`", "7.3", *_verdict(on_t4)])
    table(["step", "ours with", "guide GB", "ours GB", "of", "verdict"], rows)


def _verdict(found: dict[str, Any]) -> list[str]:
    if "failure" in found:
        return ["-", "-", found["failure"]]
    chance = f", chance {found['chance']:.0%}" if found["verdict"] == "tight" else ""
    return [gb(found["peak_total"]), gb(found["capacity"]), found["verdict"] + chance]


def print_plans(plans: list[dict[str, Any]]) -> None:
    rows = []
    for (hardware, what, precision, _), plan in zip(PLANS, plans, strict=True):
        used = "-" if "failure" in plan else "`" + "`, `".join(plan["techniques"] or ["none"]) + "`"
        slower = "-" if "failure" in plan else f"{plan['slowdown']:.2f}"
        rows.append([hardware, what, precision, used, *_verdict(plan.get("estimate", plan)), slower])
    table(["GPU", "what trains", "precision", "techniques", "GB", "of", "verdict", "time, of what was given"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=400, help="seconds a plan may take (default 400)")
    parser.add_argument("--processes", type=int, default=2, help="estimates at a time (default 2)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    rungs = [Ask(hardware=A100, precision="bf16-true", techniques=techniques) for techniques in LADDER.values()]
    asks = [*COLUMNS.values(), *INFERENCE.values(), *rungs, *BATCHES.values()]
    with ThreadPoolExecutor(options.processes) as pool:
        plans = list(pool.map(functools.partial(attempt, planned, limit=options.limit), range(len(PLANS))))
        found = dict(zip(asks, pool.map(functools.partial(attempt, estimated, limit=options.limit), asks)))
    progress("")
    print_components({n: found[a] for n, a in COLUMNS.items()}, {n: found[a] for n, a in INFERENCE.items()})
    print_ladder([found[ask] for ask in rungs], found[BATCHES["T4, frozen base, 1"]])
    table(
        ["the guide's images a batch", "ours with", "GB", "of", "verdict"],
        [_batch_row(*p, found) for p in BATCHES.items()],
    )
    print_plans(plans)
    rows = [{**vars(ask), "estimate": value} for ask, value in found.items()]
    report(rows, PACKAGES, options.json, plans=[_named(*pair) for pair in zip(PLANS, plans)], guide=GUIDE)


def _batch_row(name: str, ask: Ask, found: dict[Ask, Any]) -> list[str]:
    used = " + ".join([ask.precision, *ask.techniques])
    return [name, f"{ask.batch}: `{used}`", *_verdict(found[ask])]


def _named(asked: tuple[str, str, str, tuple[str, ...]], plan: dict[str, Any]) -> dict[str, Any]:
    return {"hardware": asked[0], "trained": asked[1], "precision": asked[2], "given": asked[3], **plan}


if __name__ == "__main__":
    main()

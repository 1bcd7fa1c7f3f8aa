"""What planners say a run takes beside what it takes: Floatline's estimate, and what else there is to ask.

    python benchmarks/plan_peers.py --json benchmarks/results/plan_peers_CPU_DATE.json
    python benchmarks/plan_peers.py --only published

    real         peak of two updates by the real allocator, in a process where nothing else lives (observe/allocations)
    floatline    `estimate` of the same workload
    accelerate   "Training using Adam" of `accelerate estimate-memory`, by its own functions, on the same class without
                 weights (its command takes the hub's AutoModel, which has no head)
    ZeRO-2, -3   DeepSpeed's estimators of model states, one GPU and no offload:
                 20 P and 18 P + 4 L bytes; P parameters, L those of the largest module
    16 P, 18 P   the rules of thumb: fp32 with Adam, and mixed precision with a half-precision copy
    error        said / real - 1

None of the others sees the batch, so none can tell activations; their errors say how much of a peak that leaves out.
A second table holds the estimate against peaks that others published for CUDA GPUs (published_peaks.py).

Source of the ZeRO formulas: deepspeed.runtime.zero.stage_1_and_2.estimate_zero2_model_states_mem_needs and
stage3.estimate_zero3_model_states_mem_needs; docs: https://deepspeed.readthedocs.io/en/latest/memory.html
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from torch import nn

from clean_process import Failed, in_clean_process
from common import print_table, progress, report
from published_peaks import GIB, PUBLISHED

PACKAGES = ("floatline", "torch", "transformers", "accelerate")
INSTALL = 'pip install -e ".[bench]"'
LIMIT = 900.0
"""Seconds that a run may take; they are seconds to a minute on an idle machine."""
PEERS = ("floatline", "accelerate", "ZeRO-2", "ZeRO-3", "16 P", "18 P")


@dataclass(frozen=True)
class Case:
    """One run: a model, a batch, and how it is trained."""

    model: str
    shape: dict[str, Any]
    precision: str = "32-true"
    techniques: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        sizes = " ".join(f"{key} {value}" for key, value in self.shape.items())
        return ", ".join([f"{self.model} {sizes}", self.precision, *self.techniques])


SMALL_VL = "qwen3-vl-2b, smaller"
LEAN = ("checkpointing", "chunked_loss")
CASES = (
    Case("gpt2", {"batch": 4, "seq": 512}),
    Case("gpt2", {"batch": 4, "seq": 512}, "bf16-mixed"),
    Case("gpt2", {"batch": 4, "seq": 512}, "32-true", LEAN),
    Case("bert-base", {"batch": 8, "seq": 128}),
    Case("smollm2-135m", {"batch": 2, "seq": 512}),
    Case("t5-small", {"batch": 8, "seq": 256, "target": 64}),
    Case("vit-base", {"batch": 8}),
    Case("vit-base", {"batch": 8}, "bf16-mixed"),
    Case("resnet-50", {"batch": 16}),
    Case("whisper-tiny", {"batch": 4, "seq": 64}),
    Case(SMALL_VL, {"batch": 1, "seq": 512, "image": (448, 448)}),
    Case(SMALL_VL, {"batch": 1, "seq": 512, "image": (448, 448)}, "bf16-mixed", ("freezing(modules='model.visual')",)),
)


@dataclass
class Row:
    """One line of the first table; bytes."""

    case: str
    parameters: int = 0
    real: int = 0
    said: dict[str, int] = field(default_factory=dict)
    failure: str = ""

    def error(self, peer: str) -> float:
        return self.said[peer] / self.real - 1


# ---------------------------------------------------------------------------------------------------------------------
# The workloads


def source_of(case: Case) -> Any:
    from floatline.plan.shape import Shape
    from floatline.plan.sources import load_source

    shape = Shape(**case.shape)
    return load_source(_smaller_vl() if case.model == SMALL_VL else case.model, shape)


def _smaller_vl() -> str:
    """Write a config of Qwen3-VL with fewer and narrower layers; the 2B's own would need 34 GB here."""
    import json
    import tempfile

    from floatline.plan.bundled import describe

    config = json.loads(json.dumps(describe("qwen3-vl-2b").config))
    config["text_config"] |= {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64,
                              "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
    config["text_config"]["rope_parameters"]["mrope_section"] = [12, 10, 10]
    config["vision_config"] |= {"hidden_size": 384, "intermediate_size": 1536, "num_heads": 6, "depth": 8,
                                "out_hidden_size": 512, "deepstack_visual_indexes": [1, 3, 5]}  # fmt: skip
    folder = Path(tempfile.gettempdir()) / "floatline-plan-peers-vl"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What each of them says


def real_peak(case: Case) -> int:
    """Train two updates, and return the allocator's peak."""
    from floatline.observe.allocations import record_allocations
    from floatline.step import TrainStep

    torch.set_num_threads(1)
    work = source_of(case).work
    with record_allocations(torch.device("cpu")) as seen:
        model = work.build_model()
        step = TrainStep(
            model, work.optimizer, case.precision, work.loss, 1.0, techniques=case.techniques, hardware="cpu"
        )
        batch = work.build_batch()
        for _ in range(2):
            if not step(batch).applied:
                raise RuntimeError("an update was not applied")
    return seen.peak


def said(case: Case) -> tuple[int, dict[str, int]]:
    """Return the number of parameters, and what each peer says."""
    from floatline import estimate

    torch.set_num_threads(1)
    source = source_of(case)
    ours = estimate(source.work, "cpu", case.precision, case.techniques).peak_allocated
    with torch.device("meta"):
        model = source.work.build_model()
    count = sum(parameter.numel() for parameter in model.parameters())
    return count, {
        "floatline": ours,
        "accelerate": accelerate_says(model, case.precision),
        "ZeRO-2": 20 * count,
        "ZeRO-3": 18 * count + 4 * largest_module(model),
        "16 P": 16 * count,
        "18 P": 18 * count,
    }


def accelerate_says(model: nn.Module, precision: str) -> int:
    """Return the largest of the four figures of which `accelerate estimate-memory` prints the largest."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    total, _ = calculate_maximum_sizes(model)
    return int(max(estimate_training_usage(total, "float32" if precision == "32-true" else "bfloat16").values()))


def largest_module(model: nn.Module) -> int:
    """Return the parameters of the module that has the most of its own, as DeepSpeed counts a layer."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())


def measure(case: Case) -> Row:
    progress(case.name)
    try:
        count, figures = in_clean_process(said, case, limit=LIMIT)
        return Row(case.name, count, in_clean_process(real_peak, case, limit=LIMIT), figures)
    except Failed as error:
        return Row(case.name, failure=str(error))


# ---------------------------------------------------------------------------------------------------------------------
# Published peaks


def ours_for(index: int) -> dict[str, Any]:
    """Return the estimate for the setting of a published figure, in its quantity."""
    from contextlib import nullcontext

    from floatline import estimate
    from floatline.techniques import fake_ranks

    torch.set_num_threads(1)
    entry = PUBLISHED[index]
    with fake_ranks(entry.ranks) if entry.ranks > 1 else nullcontext():
        found = estimate(entry.work(), entry.hardware, entry.precision, entry.techniques, max_grad_norm=entry.clip)
    context = found.context if entry.context is None else entry.context
    nbytes = {
        "allocated": found.peak_allocated,
        "total": found.peak_reserved + context,
        "states": states_of(found),
    }[entry.quantity]
    return {"nbytes": nbytes, "peak_op": found.timeline.op, "categories": found.categories, "context": context}


def states_of(found: Any) -> int:
    """Return weights, gradients and optimizer state; a weight that is trained has a gradient of its size."""
    held = sum(found.states.get(name, 0) for name in ("parameters", "optimizer state", "gradients"))
    return held + found.states.get("parameters", 0) * ("gradients" not in found.states)


def published_row(index: int) -> dict[str, Any]:
    entry = PUBLISHED[index]
    progress(f"{entry.where}: {entry.what}")
    facts = {name: value for name, value in vars(entry).items() if name != "work"}
    try:
        found = in_clean_process(ours_for, index, limit=LIMIT)
    except Failed as error:
        return {**facts, "failure": str(error)}
    return {**facts, "ours": found, "error": found["nbytes"] / entry.nbytes - 1, "failure": ""}


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def print_first(rows: list[Row]) -> dict[str, float]:
    """Print the table of what was measured, and return the medians of the absolute errors."""
    lines = []
    for row in rows:
        if row.failure:
            lines.append([row.case, "-", "-", *("-" for _ in PEERS)])
            continue
        errors = [f"{row.error(peer):+.2%}" if peer == "floatline" else f"{row.error(peer):+.0%}" for peer in PEERS]
        lines.append([row.case, f"{row.parameters / 1e6:.1f}", f"{row.real / 2**20:.0f}", *errors])
    good = [row for row in rows if not row.failure]
    medians = {peer: statistics.median(abs(row.error(peer)) for row in good) for peer in PEERS} if good else {}
    lines.append(["median of |error|", "", "", *(f"{medians[peer]:.2%}" for peer in medians)])
    print_table(("run", "M params", "real MiB", *PEERS), lines)
    for row in rows:
        if row.failure:
            print(f"\n{row.case}: {row.failure}")
    return medians


def print_second(rows: list[dict[str, Any]]) -> None:
    """Print the table of what others published."""
    lines = []
    for row in rows:
        ours = f"{row['ours']['nbytes'] / GIB:.2f}" if not row["failure"] else "-"
        error = f"{row['error']:+.1%}" if not row["failure"] else row["failure"][:60]
        place = [row["where"], row["what"], row["hardware"], row["quantity"], f"{row['nbytes'] / GIB:.2f}", ours, error]
        lines.append([*place, row["comparable"], row["differs"]])
    header = ("source", "setting", "on", "what", "published GiB", "ours GiB", "error", "comparable", "what differs")
    print_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("measured", "published"), help="one of the two tables")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one thread (default 2)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise SystemExit(f"accelerate is not installed; the peers' table needs it: {INSTALL}") from None
    rows: list[Row] = []
    published: list[dict[str, Any]] = []
    medians: dict[str, float] = {}
    with ThreadPoolExecutor(options.processes) as pool:
        if options.only != "published":
            rows = list(pool.map(measure, CASES))
            progress("")
            medians = print_first(rows)
            print()
        if options.only != "measured":
            published = list(pool.map(published_row, range(len(PUBLISHED))))
            progress("")
            print_second(published)
    results = [{**asdict(row), "errors": {p: row.error(p) for p in row.said}} for row in rows]
    report(results, PACKAGES, options.json, medians=medians, published=published)
    raise SystemExit(any(row.failure for row in rows) or any(row["failure"] for row in published))


if __name__ == "__main__":
    main()

"""How far the planner's trace is off: predicted against the real allocator, over many models and settings.

    python benchmarks/plan_accuracy.py
    python benchmarks/plan_accuracy.py --only whisper 16-mixed

    traced   peak of the tensors of two updates, from fake tensors alone (observe/trace.py)
    real     the same by the real allocator (observe/allocations.py), in a process where nothing else lives
    error    traced / real - 1
    s        seconds to trace, imports of the model's code included; rows run side by side, one thread each

Each row is a process of its own (clean_process.py). The record begins before the model is built, so the
model and its batch count as the allocator sees them.

A row that cannot be traced, or not be trained, is a failure and is listed as such.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch

from clean_process import Failed, in_clean_process
from common import print_table, progress, quantile, report

PACKAGES = ("floatline", "torch", "transformers", "torchao", "peft")
LIMITS = {"median": 0.005, "nine in ten": 0.03, "worst": 0.10}
"""What the errors are held to, as shares."""

MOST_UPDATES = 12

SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("32-true", ()),
    "bf16-mixed": ("bf16-mixed", ()),
    "16-mixed": ("16-mixed", ()),
    "bf16-true": ("bf16-true", ()),
    "checkpointing": ("32-true", ("checkpointing",)),
    "checkpointing, bf16-mixed": ("bf16-mixed", ("checkpointing(every=2)",)),
    "offload to disk": ("32-true", ("offload(to=disk, min_bytes=4096)",)),
    "accumulation": ("32-true", ("accumulation(micro_batches=4)",)),
    "lora": ("bf16-mixed", ("lora(rank=8)",)),
    "8-bit state": ("32-true", ("low_bit_optimizer",)),
    "chunked loss": ("32-true", ("chunked_loss(chunk_tokens=128)",)),
    "kahan": ("bf16-true", ("kahan",)),
    "in backward": ("32-true", ("optimizer_in_backward",)),
    "together": ("bf16-mixed", ("checkpointing", "chunked_loss(chunk_tokens=128)", "accumulation(micro_batches=2)")),
}
"""Setting -> precision and techniques."""

PAIRS: dict[str, tuple[str, ...]] = {
    "bf16-mixed": ("llama", "bert", "vit", "qwen3_vl", "resnet", "lstm", "whisper", "mixtral", "translator"),
    "16-mixed": ("gpt2", "t5", "clip", "unet", "qwen3_moe", "experts"),
    "bf16-true": ("llama", "gemma3_vl", "segformer", "mlp"),
    "checkpointing": ("gpt2", "bart", "vit", "qwen25_vl", "mlp", "conv"),
    "checkpointing, bf16-mixed": ("qwen3", "whisper", "swin"),
    "offload to disk": ("gpt2", "vit", "tied"),
    "accumulation": ("llama", "t5", "mixtral", "mlp", "conv"),
    "lora": ("qwen3", "llava", "vit"),
    "8-bit state": ("gpt2", "tied"),
    "chunked loss": ("gemma2", "qwen3_vl"),
    "kahan": ("neox",),
    "in backward": ("opt", "bert"),
    "together": ("llama", "qwen25_vl"),
}
"""Setting -> the models it is tried on, besides all of them plain."""


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes and seconds. `failure` says what went wrong, "" when nothing did."""

    model: str
    setting: str
    traced: int = 0
    real: int = 0
    error: float = 0.0
    seconds: float = 0.0
    seconds_real: float = 0.0
    peak_op: str = ""
    failure: str = ""


def measure(name: str, setting: str) -> Row:
    """Trace and train one model in this process."""
    torch.set_num_threads(1)
    from floatline.step import Workload
    from plan_models_more import MODELS

    model, (precision, techniques) = MODELS[name], SETTINGS[setting]
    work = Workload(model=model.build, batch=model.batch, loss=model.loss)
    clip = None if "optimizer_in_backward" in techniques else 1.0
    step = {"precision": precision, "techniques": techniques, "max_grad_norm": clip}
    try:
        seconds, peak, op = _traced(work, step)
    except Exception as error:
        return Row(name, setting, failure=f"trace: {type(error).__name__}: {error}")
    try:
        seconds_real, real = _real(work, step)
    except Exception as error:
        return Row(name, setting, peak, failure=f"training: {type(error).__name__}: {error}")
    return Row(name, setting, peak, real, peak / real - 1, seconds, seconds_real, op)


def _traced(work: Any, step: dict[str, Any]) -> tuple[float, int, str]:
    from floatline.observe.events import peak_of
    from floatline.observe.trace import trace

    began = time.perf_counter()
    found = trace(work, hardware="cpu", **step)
    peak, at = peak_of(found.events)
    made = found.storages[found.events[at][0]]
    return time.perf_counter() - began, peak, f"{made.op} {made.phase.value} {made.module}".strip()


def _real(work: Any, step: dict[str, Any]) -> tuple[float, int]:
    from floatline.observe.allocations import record_allocations
    from floatline.step import TrainStep

    began = time.perf_counter()
    with record_allocations(torch.device("cpu")) as seen:
        train = TrainStep(work.build_model(), work.optimizer, loss=work.loss, **step)
        batch = work.build_batch()
        applied = 0
        for _ in range(MOST_UPDATES):  # the first ones of 16-mixed find a loss scale; the trace takes that as done
            applied += bool(train(batch).applied)
            if applied == 2:
                break
        else:
            raise RuntimeError(f"{applied} of {MOST_UPDATES} updates were applied")
    return time.perf_counter() - began, seen.peak


def in_own_process(name: str, setting: str, limit: float) -> Row:
    """Measure in a fresh process, which is ended after `limit` seconds."""
    progress(f"{name}, {setting}")
    try:
        row: Row = in_clean_process(measure, name, setting, limit=limit)
    except Failed as failed:
        return Row(name, setting, failure=str(failed))
    return row


def pairs(words: list[str] | None) -> list[tuple[str, str]]:
    """Return the rows to measure: those whose model or setting is one of the words, all without words."""
    from plan_models_more import MODELS

    every = [(name, "plain") for name in MODELS]
    every += [(name, setting) for setting, names in PAIRS.items() for name in names]
    return [pair for pair in every if not words or set(pair) & set(words)]


def cells(row: Row) -> list[str]:
    """Return a row of the table as text."""
    if row.failure:
        return [row.model, row.setting, "-", "-", "fails", "-", ""]
    sizes = [f"{row.traced / 2**20:.2f}", f"{row.real / 2**20:.2f}"]
    return [row.model, row.setting, *sizes, f"{row.error:+.2%}", f"{row.seconds:.1f}", row.peak_op]


def summary(rows: list[Row]) -> dict[str, float]:
    """Return median, ninth decile and worst of the absolute errors, and the number of failures."""
    errors = [abs(row.error) for row in rows if not row.failure]
    if not errors:
        return {"failures": len(rows)}
    return {
        "median": statistics.median(errors),
        "nine in ten": quantile(errors, 0.9),
        "worst": max(errors),
        "failures": len(rows) - len(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose model or setting is one of these")
    parser.add_argument("--limit", type=float, default=120, help="seconds a row may take (default 120)")
    parser.add_argument("--processes", type=int, default=2, help="rows at a time, each on one thread (default 2)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.processes) as pool:
        rows = list(pool.map(lambda pair: in_own_process(*pair, options.limit), pairs(options.only)))
    progress("")
    print_table(("model", "setting", "traced MiB", "real MiB", "error", "s", "peak at"), map(cells, rows))
    for row in rows:
        if row.failure:
            print(f"\n{row.model}, {row.setting}: {row.failure}")
    found = summary(rows)
    print(f"\n{len(rows)} rows: " + ", ".join(_line(name, value) for name, value in found.items()))
    report([asdict(row) for row in rows], PACKAGES, options.json, summary=found)
    raise SystemExit(any(found.get(name, 0) > limit for name, limit in LIMITS.items()) or found["failures"] > 0)


def _line(name: str, value: float) -> str:
    return f"{name} {value}" if name == "failures" else f"{name} {value:.2%} (limit {LIMITS[name]:.1%})"


if __name__ == "__main__":
    main()

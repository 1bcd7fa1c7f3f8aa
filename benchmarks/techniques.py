"""What each technique saves and what it costs: peak memory and step time against the plain step, peers beside.

    python benchmarks/techniques.py
    python benchmarks/techniques.py --models gpt2 --only checkpointing offload --rounds 9

    activations   alive after the forward, beyond what was alive before the step: what autograd keeps, logits included
    peak          weights, gradients, optimizer state and the step's peak together
    state         the optimizer's state alone
    ms            median step
    x             time as a ratio to the plain step: median over rounds; all take turns within a round

Memory is counted by the real allocator (observe/allocations.py), in a step of its own. "plain, again" is the plain step
a second time: how far its ratio is from 1 is what this run cannot tell apart. Peers ("~") are run as their users would,
around the same model and the same fp32 arithmetic; the plain step they are compared with is ours.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch

import floatline as fl
import technique_peers as peers
from common import keep_memory, print_table, progress, quantile, report
from floatline.observe.allocations import Allocations
from floatline.step import default_loss, move
from race import Contestant, adamw, tensors_of, time_in_turns, weigh
from technique_models import WORKS, Work

PACKAGES = ("floatline", "torch", "transformers", "torchao", "torch-optimi", "peft", "accelerate", "lightning")


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes and seconds."""

    model: str
    name: str
    activations: int
    peak: int
    state: int
    seconds: float
    ratio: float
    low: float
    high: float


def stacks(work: Work) -> dict[str, list[str]]:
    """Return the techniques to measure on a model, and the stacks of them that are useful together."""
    chunked = ["chunked_loss(chunk_tokens=256)"] if work.language else []
    lora = f"lora(rank=8, targets={work.adapted})"
    found = {
        "precision": ["precision(policy='bf16-mixed')"],
        "accumulation, 4 micro-batches": ["accumulation(micro_batches=4)"],
        "checkpointing": ["checkpointing"],
        "checkpointing, every 2nd": ["checkpointing(every=2)"],
        "checkpointing, keep matmul": ["checkpointing(keep=['matmul'])"],
        "checkpointing, keep attention": ["checkpointing(keep=['attention'])"],
        "attention, math": ["attention(kernel=math)"],
        "offload to host": ["offload(min_bytes=4096)"],
        "offload to disk": ["offload(to=disk, min_bytes=4096)"],
        "packing": ["packing"],
        "batching": [f"batching(max_tokens={512})"],
        "low-bit optimizer, 8": ["low_bit_optimizer"],
        "low-bit optimizer, 4": ["low_bit_optimizer(bits=4)"],
        "low-bit optimizer, fp8": ["low_bit_optimizer(bits=fp8)"],
        "optimizer offload": ["optimizer_offload"],
        "kahan, bf16-true": ["precision(policy='bf16-true')", "kahan"],
        "stochastic rounding, bf16-true": ["precision(policy='bf16-true')", "stochastic_rounding"],
        "optimizer in backward": ["optimizer_in_backward"],
        "freezing": [f"freezing(modules={work.tower})"],
        "lora": [lora],
        "chunked loss": chunked,
        "compile, per layer": ["compile"],
        "compile, budget 0.3": ["compile", "checkpointing(budget=0.3)"],
        "= checkpointing + offload": ["checkpointing", "offload(to=disk, min_bytes=4096)"],
        "= checkpointing + chunked loss": ["checkpointing", *chunked],
        "= + accumulation + 8-bit state": [
            "checkpointing",
            *chunked,
            "accumulation(micro_batches=4)",
            "low_bit_optimizer",
        ],
        "= checkpointing + chunked loss + in backward": ["checkpointing", *chunked, "optimizer_in_backward"],
        "= lora + checkpointing + chunked loss": [lora, "checkpointing", *chunked],
        "= all of these, bf16-mixed": [
            "precision(policy='bf16-mixed')",
            lora,
            "checkpointing",
            *chunked,
            "accumulation(micro_batches=4)",
            "low_bit_optimizer",
            "offload(to=disk, min_bytes=4096)",
        ],
    }
    wanted = {name: techniques for name, techniques in found.items() if techniques}
    if not work.language:
        wanted = {name: t for name, t in wanted.items() if name not in LANGUAGE_ONLY}
    if not work.padded:
        wanted = {name: t for name, t in wanted.items() if name not in ("packing", "batching")}
    if work.name != "gpt2":  # minutes of compiling; one model shows it
        wanted = {name: t for name, t in wanted.items() if not name.startswith("compile")}
    return wanted


LANGUAGE_ONLY = (
    "checkpointing, keep attention",
    "attention, math",
    "packing",
    "batching",
    "chunked loss",
    "= checkpointing + chunked loss",
    "= checkpointing + chunked loss + in backward",
)


def ours(name: str, work: Work, techniques: list[str], device: torch.device) -> Contestant:
    """Return a TrainStep with techniques as a contestant."""
    recording: list[Allocations] = []

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        value = (work.loss or default_loss)(model, batch)
        for seen in recording:
            seen.mark("forward")
        return value

    precision = "auto" if any(text.startswith("precision") for text in techniques) else "32-true"
    clip = None if "optimizer_in_backward" in techniques else 1.0
    step = fl.TrainStep(
        work.build().to(device), adamw, precision=precision, loss=loss, max_grad_norm=clip, techniques=techniques
    )
    batch = move(work.batch(), device)
    return Contestant(
        name, lambda: step(batch), lambda: tensors_of(step.model, step.optimizer), step.optimizer, recording
    )


def contestants(work: Work, words: list[str] | None, device: torch.device) -> list[Contestant]:
    """Return all contestants on a model whose names hold one of the words, the plain step first."""
    plans: list[tuple[str, Callable[[], Contestant]]] = [
        ("plain", lambda: ours("plain", work, [], device)),
        ("plain, again", lambda: ours("plain, again", work, [], device)),
    ]
    for name, techniques in stacks(work).items():
        plans.append((name, lambda name=name, t=techniques: ours(name, work, t, device)))
    for name, make in peers.PEERS.items():
        plans.append((f"~ {name}", lambda name=name, make=make: make(f"~ {name}", work, device)))
    made = []
    for name, make in plans:
        if name.startswith("plain") or words is None or any(word.lower() in name.lower() for word in words):
            progress(f"{work.name}: {name} is made")
            contestant = make()
            if contestant is not None:
                made.append(contestant)
    return made


def measure(work: Work, words: list[str] | None, rounds: int, device: torch.device) -> list[Row]:
    """Return the table's rows for one model."""
    racers = contestants(work, words, device)
    weights = {}
    for racer in racers:
        progress(f"{work.name}: {racer.name} is weighed")
        weights[racer.name] = weigh(racer, device)
    seconds = time_in_turns(racers, rounds, device)
    rows = []
    for racer in racers:
        ratios = [own / plain for own, plain in zip(seconds[racer.name], seconds["plain"], strict=True)]
        rows.append(
            Row(
                work.name,
                racer.name,
                *weights[racer.name],
                seconds=statistics.median(seconds[racer.name]),
                ratio=statistics.median(ratios),
                low=quantile(ratios, 0.1),
                high=quantile(ratios, 0.9),
            )
        )
    return rows


def cells(row: Row, plain: Row) -> list[str]:
    """Return a row of the table as text, shares of the plain step in per cent."""
    return [
        row.name,
        _mib(row.activations) if row.activations else "-",
        f"{row.activations / plain.activations:.0%}" if row.activations else "-",
        _mib(row.peak),
        f"{row.peak / plain.peak:.0%}",
        _mib(row.state) if row.state else "-",
        f"{row.seconds * 1e3:.0f}",
        f"{row.ratio:.2f}",
        f"{row.low:.2f}-{row.high:.2f}",
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=WORKS, default=list(WORKS), help="default: all")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contestants whose names hold one of these words")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on CPU (default 2)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = []
    for name in options.models:
        found = measure(WORKS[name], options.only, options.rounds, device)
        size = sum(p.numel() for p in WORKS[name].build().parameters()) / 1e6
        print(f"\n{name}, {size:.1f} M parameters, fp32, AdamW")
        header = ("", "activations MiB", "of plain", "peak MiB", "of plain", "state MiB", "ms", "x", "p10-p90")
        print_table(header, [cells(row, found[0]) for row in found])
        rows += found
        gc.collect()
    report([asdict(row) for row in rows], PACKAGES, options.json, threads=options.threads, device=options.device)


if __name__ == "__main__":
    main()

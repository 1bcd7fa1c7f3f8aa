"""What a training step costs beside its arithmetic: a bare PyTorch loop and libraries, interleaved, on CPU.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --rounds 60 --json benchmarks/results/step_overhead_epyc_2026-01-31.json

The model is small (see step_contestants.py, which also says what everybody logs), so that what a loop adds is visible;
on a large model the same microseconds are a smaller share, with `--model 0.2M` a larger one that shows them more
exactly.

    ms/step     median over all steps
    ratio       to the bare loop: median over rounds, and what eight of ten rounds lie between
    added us    median over rounds of the difference from the bare loop
    CPU         the ratio of processor time, which other programs disturb less
    loss after  on the training data at the end: shows that all trained the same

"bare, again" is the bare loop a second time: how far its ratio is from 1 is what this run cannot tell apart.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import step_contestants as who
from common import Comparison, compare, interleave, print_table, report

CONTESTANTS = {
    "bare loop": who.bare,
    "bare, again": who.bare,
    "bare, loss not read": who.bare_unread,
    "floatline.TrainStep": who.train_step,
    "floatline train": who.full_loop,
    "accelerate": who.accelerate,
    "Lightning Fabric": who.fabric,
    "Lightning Trainer, log each step": who.lightning_every,
    "Lightning Trainer, log each 50": who.lightning_default,
    "HF Trainer, log each step": who.transformers_every,
    "HF Trainer, log each 500": who.transformers_default,
}
PACKAGES = (
    "floatline",
    "torch",
    "torchdata",
    "accelerate",
    "lightning",
    "transformers",
    "tensorboard",
    "rich",
    "numpy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps a turn that count (default 8)")
    parser.add_argument("--rounds", type=int, default=45, help="turns of each contestant (default 45)")
    parser.add_argument("--launches", type=int, default=3, help="fresh processes, this many times (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--model", choices=who.SHAPES, default="5M", help="parameters of the model (default 5M)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contestants whose names hold one of these words")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # inherited by the contestants
    os.environ["BENCHMARK_MODEL"] = options.model
    chosen = {name: run for name, run in CONTESTANTS.items() if name == "bare loop" or _asked(name, options.only)}
    turns = interleave(chosen, steps=options.steps, rounds=options.rounds, launches=options.launches)
    rows = compare(turns, "bare loop")
    print_table(("", "ms/step", "ratio", "p10-p90", "added us", "CPU", "loss after"), map(cells, rows))
    report([asdict(row) for row in rows], PACKAGES, options.json, threads=options.threads, model=options.model)


def _asked(name: str, words: list[str] | None) -> bool:
    return words is None or any(word.lower() in name.lower() for word in words)


def cells(row: Comparison) -> list[str]:
    """Return a row of the table as text."""
    return [
        row.name,
        f"{row.seconds * 1e3:.2f}",
        f"{row.ratio:.3f}",
        f"{row.low:.3f}-{row.high:.3f}",
        f"{row.added * 1e6:+.0f}",
        f"{row.cpu_ratio:.3f}",
        f"{row.check:.2f}",
    ]


if __name__ == "__main__":
    main()

"""What it costs to know each step whether it was finite: the guard beside what people use, interleaved, on CPU.

    python benchmarks/finite_overhead.py
    python benchmarks/finite_overhead.py --json benchmarks/results/finite_overhead_epyc-2core_2026-01-31.json

All train the model of step_overhead.py (5 M parameters, bf16 autocast); who does what is in finite_contestants.py, and
what the columns mean in step_overhead.py. "bare, again" is the bare loop a second time: how far its ratio is from 1 is
what this run cannot tell apart.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

import finite_contestants as who
import step_contestants
from common import compare, interleave, print_table, report
from step_overhead import cells

CONTESTANTS = {
    "bare loop": step_contestants.bare,
    "bare, again": step_contestants.bare,
    "isfinite of the norm": who.norm_tested,
    "floatline.TrainStep": who.guarded,
    "TrainStep, looks every 10": who.guarded_closely,
    "TrainStep, rollback": who.guarded_with_rollback,
    "guide-style monitor": who.guide_monitor,
    "transformers DebugUnderflowOverflow": who.debug_hooks,
    "autograd anomaly mode": who.anomaly_mode,
}
PACKAGES = ("floatline", "torch", "transformers", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="steps a turn that count (default 8)")
    parser.add_argument("--rounds", type=int, default=45, help="turns of each contestant (default 45)")
    parser.add_argument("--launches", type=int, default=2, help="fresh processes, this many times (default 2)")
    parser.add_argument("--model", choices=step_contestants.SHAPES, default="5M", help="parameters (default 5M)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the contestants
    os.environ["BENCHMARK_MODEL"] = options.model
    turns = interleave(CONTESTANTS, steps=options.steps, rounds=options.rounds, launches=options.launches)
    rows = compare(turns, "bare loop")
    print_table(("", "ms/step", "ratio", "p10-p90", "added us", "CPU", "loss after"), map(cells, rows))
    report([asdict(row) for row in rows], PACKAGES, options.json, threads=1, model=options.model)


if __name__ == "__main__":
    main()

"""Sharding over several ranks, ours beside others' FSDP2: what a rank holds, its peak, and the time of a step.

    python benchmarks/sharding.py
    python benchmarks/sharding.py --models gpt2 --rounds 9 --only sharding fully_shard
    python benchmarks/sharding.py --device cuda --ranks 2

    weights, gradients, state   bytes on one rank, of shards the local part; where ranks differ, the largest
    held      alive between updates by the allocator: weights, state and whatever else is kept (buckets of DDP)
    peak      held and the step's own peak together, by the real allocator
    ms        median step; the slowest rank's
    x         time as a ratio to the bare loop: median over rounds; all take turns within a round
    cpu       as x, of processor time, all ranks together: other programs do not lengthen it
    loss      mean over the ranks in the last update; all have made as many, on the same data

The script starts itself on N ranks through torchrun: gloo on CPU, NCCL on CUDA. All contestants live in the same
processes. "fully_shard, again" is the bare loop a second time: how far it is from 1 is what this run cannot tell apart.
Losses that do not agree end the run.

gloo lets go of what it has sent in threads of its own, which torch's profiler does not see; so what is held is asked of
the C library (`mallinfo2`, glibc only), and memory that is let go late in a step may be missing from the peak.

Not covered: several hosts; mixed precision. CPU ranks share a memory bus, so the collectives cost other than on a wire.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
import torch.distributed as dist

import sharding_peers as peers
from common import print_table, progress, quantile, report
from floatline.observe.allocations import record_allocations
from floatline.step import move
from floatline.techniques.distributed.groups import join_ranks, leave_ranks
from race import bytes_of, state_of
from technique_models import WORKS, Work

PACKAGES = ("floatline", "torch", "transformers", "accelerate", "lightning")
MODELS = {"gpt2": WORKS["gpt2"], "tied": WORKS["tied"], "untied": peers.untied(WORKS["gpt2"])}
ROWS = 4  # of one rank: every rank then has as many targets
BASELINE = next(iter(peers.CONTESTANTS))
AGREE = 1e-4  # relative; the sums of ranks and of one process are rounded in another order


@dataclass(frozen=True)
class Weight:
    """Bytes on one rank."""

    weights: int
    gradients: int
    state: int
    held: int
    peak: int


@dataclass(frozen=True)
class Row:
    """One line of the table; bytes and seconds, None where the contestant does not run."""

    model: str
    name: str
    note: str
    weights: int | None = None
    gradients: int | None = None
    state: int | None = None
    held: int | None = None
    peak: int | None = None
    seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    cpu_ratio: float | None = None
    loss: float | None = None


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; mapped and ordinary blocks in use, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
    ]
    _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def in_use(device: torch.device) -> int:
    """Return the bytes that are allocated now: of tensors on CUDA, of everything in this process on CPU."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _MallInfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


class Racer:
    """A contestant on this rank, weighed while it is made and warms up."""

    def __init__(self, name: str, rank: peers.Rank) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.loss = float("nan")
        before = in_use(rank.device)
        self.contestant = peers.CONTESTANTS[name](rank)
        self.contestant.weigh_gradients()
        self.update()
        self.update()
        held = in_use(rank.device) - before
        with record_allocations(rank.device) as stepping:
            self.update()
        contestant = self.contestant
        self.weight = Weight(
            weights=bytes_of(list(contestant.model.parameters())),
            gradients=sum(contestant.gradients),
            state=bytes_of(state_of(contestant.optimizer)),
            held=held,
            peak=held + stepping.peak,
        )

    def update(self) -> None:
        if self.contestant.step is not None:
            self.loss = float(self.contestant.step())

    def turn(self, device: torch.device) -> None:
        """Time one update, begun by all ranks together."""
        dist.barrier()
        _wait_for(device)
        wall, cpu = time.perf_counter(), time.process_time()
        self.update()
        _wait_for(device)
        self.seconds.append(time.perf_counter() - wall if self.contestant.step else 0.0)
        self.cpu.append(time.process_time() - cpu if self.contestant.step else 0.0)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(rank: peers.Rank) -> None:
    """Let libraries load and fill their caches, so that the first contestant is not billed for that."""
    import accelerate  # noqa: F401
    import lightning.fabric  # noqa: F401

    Racer(BASELINE, rank)


def line_up(rank: peers.Rank, words: list[str] | None) -> tuple[list[Racer], dict[str, str]]:
    """Return the contestants whose names hold one of the words, and why those that cannot run do not."""
    _warm_up(rank)
    racers, absent = [], {}
    for name in peers.CONTESTANTS:
        if name != BASELINE and words is not None and not any(word.lower() in name.lower() for word in words):
            continue
        _progress(f"{rank.work.name}: {name} is made and weighed")
        try:
            racers.append(Racer(name, rank))
        except peers.CannotRunError as error:
            absent[name] = str(error)
        except Exception as error:
            if not name.startswith("~"):
                raise
            absent[name] = f"{type(error).__name__} at {peers.site(error)}: {error}"
    return racers, absent


def race(racers: list[Racer], rounds: int, device: torch.device) -> None:
    """Time all in turns; who begins changes from round to round."""
    for number in range(rounds):
        shift = number % len(racers)
        for racer in racers[shift:] + racers[:shift]:
            _progress(f"round {number + 1}/{rounds}: {racer.name}")
            racer.turn(device)
    _progress("")


def measure(work: Work, words: list[str] | None, rounds: int, device: torch.device) -> list[Row]:
    """Return the rows for one model; every rank returns the same."""
    size = dist.get_world_size()
    rows = work.batch(rows=ROWS * size)  # type: ignore[call-arg]  # it is a partial
    mine = {key: value[ROWS * dist.get_rank() : ROWS * (dist.get_rank() + 1)] for key, value in rows.items()}
    rank = peers.Rank(work, device, move(mine, device), move(rows, device), size)
    racers, absent = line_up(rank, words)
    race(racers, rounds, device)
    found = [_row(work.name, racer) for racer in racers]
    base = next(parts for parts in found if parts["name"] == BASELINE)
    return [_against(base, parts) for parts in found] + [Row(work.name, name, why) for name, why in absent.items()]


def _row(model: str, racer: Racer) -> dict[str, Any]:
    """Return what all ranks found of a contestant, together."""
    mine = {**asdict(racer.weight), "seconds": racer.seconds, "cpu": racer.cpu, "loss": racer.loss}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    losses = [told["loss"] for told in found if told["loss"] == told["loss"]]
    return {
        "model": model,
        "name": racer.name,
        "note": racer.contestant.note,
        **{key: max(told[key] for told in found) for key in asdict(racer.weight)},
        "seconds": [max(turn) for turn in zip(*(told["seconds"] for told in found), strict=True)],
        "cpu": [sum(turn) for turn in zip(*(told["cpu"] for told in found), strict=True)],
        "loss": sum(losses) / len(losses),
    }


def _against(base: dict[str, Any], parts: dict[str, Any]) -> Row:
    """Set a contestant against the bare loop, round by round."""
    ratios = [own / other for own, other in zip(parts["seconds"], base["seconds"], strict=True)]
    cpu_ratios = [own / other for own, other in zip(parts["cpu"], base["cpu"], strict=True)]
    medians = {"seconds": statistics.median(parts["seconds"]), "cpu_ratio": statistics.median(cpu_ratios)}
    kept = {key: value for key, value in parts.items() if key != "cpu"}
    return Row(
        **{**kept, **medians}, ratio=statistics.median(ratios), low=quantile(ratios, 0.1), high=quantile(ratios, 0.9)
    )


def cells(row: Row) -> list[str]:
    """Return a row of the table as text."""
    if row.seconds is None:
        return [row.name, *["-"] * 9, "does not run, see below"]
    sizes = [row.weights, row.gradients, row.state, row.held, row.peak]
    return [
        row.name,
        *(f"{(size or 0) / 2**20:.1f}" for size in sizes),
        f"{row.seconds * 1e3:.0f}",
        f"{row.ratio:.2f}",
        f"{row.low:.2f}-{row.high:.2f}",
        f"{row.cpu_ratio:.2f}",
        f"{row.loss:.6f}",
    ]


def show(model: str, rows: list[Row], updates: int) -> None:
    """Print the table of one model, and what must be known to read it."""
    size = sum(p.numel() for p in MODELS[model].build().parameters()) / 1e6
    print(
        f"\n{model}, {size:.1f} M parameters, {dist.get_world_size()} ranks, fp32, fused AdamW, {updates} updates; MiB"
    )
    header = ("", "weights", "gradients", "state", "held", "peak", "ms", "x", "p10-p90", "cpu", "loss")
    print_table(header, map(cells, rows))
    for row in rows:
        if row.note:
            print(f"  {row.name}: {row.note}")


def disagreeing(rows: list[Row]) -> list[str]:
    """Return the contestants whose loss is not the bare loop's."""
    losses = {f"{row.model}, {row.name}: {row.loss}": row.loss for row in rows if row.loss is not None}
    base = next(iter(losses.values()))
    return [text for text, loss in losses.items() if not abs(loss - base) <= AGREE * abs(base)]


def start_ranks(count: int, threads: int) -> int:
    """Run this script on `count` ranks; returns the exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *sys.argv]
    return subprocess.run([sys.executable, *line], env=environment).returncode


def _progress(text: str) -> None:
    if dist.get_rank() == 0:
        progress(text)


def run(options: argparse.Namespace) -> None:
    """Measure on this rank, started by torchrun; the first one reports."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    join_ranks(options.device)
    device = torch.device(options.device, int(os.environ["LOCAL_RANK"]) if options.device == "cuda" else None)
    rows: list[Row] = []
    wrong: list[str] = []
    for name in options.models:
        found = measure(MODELS[name], options.only, options.rounds, device)
        if dist.get_rank() == 0:
            show(name, found, 3 + options.rounds)
        rows += found
        wrong += disagreeing(found)
    if dist.get_rank() == 0:
        report(
            [asdict(row) for row in rows],
            PACKAGES,
            options.json,
            ranks=options.ranks,
            threads=options.threads,
            device=torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        )
    leave_ranks()
    if wrong:
        raise SystemExit("losses do not agree with the bare loop's: " + "; ".join(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="contestants whose names hold one of these words")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="timed updates of each contestant (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on each rank (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        parser.error(
            f"--ranks {options.ranks} on cuda needs as many GPUs, this machine has {torch.cuda.device_count()}"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run(options)
    else:
        raise SystemExit(start_ranks(options.ranks, options.threads))


if __name__ == "__main__":
    main()

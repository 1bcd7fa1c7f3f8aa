"""What watching gradients costs: GradientMonitor beside a monitor that asks each parameter, on CPU.

    python benchmarks/monitor_overhead.py
    python benchmarks/monitor_overhead.py --model 0.2M --json benchmarks/results/monitor_overhead_NAME_DATE.json

One small transformer (step_contestants.py) is trained by a bare loop: forward and backward in fp32 or bf16 autocast,
clip, fused AdamW. After each backward every monitor looks at the same gradients, in turns, in an
order drawn anew each time. What one look takes is set beside what the bare update takes without any.

    us a look     median over all updates
    p10-p90       of the look
    ratio         (bare update + look) / bare update, of the medians

"asks each parameter" is what a common guide does: isnan, isinf, max and mean of each gradient, each read by the host.
On a GPU each of these reads also waits for the device; that is not measured here. "2-norms only" is what clipping
computes anyway.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import floatline as fl
import step_contestants as who
from common import print_table, progress, quantile, report
from floatline.step import norms_of

Look = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What one way of looking costs, in seconds."""

    name: str
    seconds: float
    low: float
    high: float
    ratio: float


def looks_at(model: nn.Module) -> dict[str, Look]:
    """Return the contestants by name, each of which looks at the gradients that the model has."""
    monitor = fl.GradientMonitor(model)
    by_parameter = fl.GradientMonitor(model, per="parameter", every=1)
    fed, rarely = fl.GradientMonitor(model), fl.GradientMonitor(model, elements_every=10)
    parameters = list(model.named_parameters())
    return {
        "nothing": lambda: None,
        "2-norms only": lambda: norms_of(parameters).total,
        "GradientMonitor": monitor.check,
        "GradientMonitor, per parameter, every=1": by_parameter.check,
        "GradientMonitor, norms given": _Fed(fed, parameters),
        "GradientMonitor, norms given, elements_every=10": _Fed(rarely, parameters),
        "asks each parameter": lambda: ask_each(parameters),
    }


class _Fed:
    """Takes the norms outside the look, as a loop does that clips by them."""

    def __init__(self, monitor: fl.GradientMonitor, parameters: list[tuple[str, nn.Parameter]]) -> None:
        self.monitor, self.parameters = monitor, parameters
        self.prepare()

    def prepare(self) -> None:
        if self.parameters[0][1].grad is not None:
            self.norms = norms_of(self.parameters)

    def __call__(self) -> object:
        return self.monitor.check(self.norms)


def ask_each(parameters: list[tuple[str, nn.Parameter]]) -> list[tuple[str, bool, bool, float, float]]:
    """Look as a common guide does: four questions a parameter, each read by the host."""
    seen = []
    for name, parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            nan, inf = torch.isnan(gradient).any().item(), torch.isinf(gradient).any().item()
            seen.append((name, nan, inf, gradient.abs().max().item(), gradient.abs().mean().item()))
    return seen


def measure(updates: int, warm_up: int, precision: str) -> list[Row]:
    """Train, look, and return what each way of looking took."""
    torch.manual_seed(0)
    model = who.TinyTransformer()
    optimizer = who.make_optimizer(model)
    data = who.Sequences()
    looks = looks_at(model)
    names = list(looks)
    taken: dict[str, list[float]] = {name: [] for name in names}
    bare: list[float] = []
    chance = random.Random(0)
    for update in range(warm_up + updates):
        progress(f"update {update + 1}/{warm_up + updates}")
        rows = [data[(who.BATCH * update + row)] for row in range(who.BATCH)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model(**batch)["loss"]
        loss.backward()
        middle = time.perf_counter() - start
        for name in chance.sample(names, len(names)):
            seconds = _time(looks[name])
            if update >= warm_up:
                taken[name].append(seconds)
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), who.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if update >= warm_up:
            bare.append(middle + time.perf_counter() - start)
    progress("")
    return rows_of(taken, bare)


def _time(look: Look) -> float:
    if isinstance(look, _Fed):
        look.prepare()
    start = time.perf_counter()
    look()
    return time.perf_counter() - start


def rows_of(taken: dict[str, list[float]], bare: list[float]) -> list[Row]:
    """Set the looks beside the bare update."""
    update = statistics.median(bare)
    rows = [Row("bare update", update, quantile(bare, 0.1), quantile(bare, 0.9), 1.0)]
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        rows.append(Row(name, middle, quantile(seconds, 0.1), quantile(seconds, 0.9), 1 + middle / update))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=150, help="updates that count (default 150)")
    parser.add_argument("--warm-up", type=int, default=15, help="updates before (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="bf16-mixed")
    parser.add_argument("--model", choices=who.SHAPES, help="parameters of the model (default 5M)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    who.WIDTH, who.LAYERS = who.SHAPES[options.model or os.environ.get("BENCHMARK_MODEL", "5M")]
    torch.set_num_threads(options.threads)
    rows = measure(options.updates, options.warm_up, options.precision)
    print_table(
        ("", "us a look", "p10-p90", "ratio"),
        ([r.name, f"{r.seconds * 1e6:.0f}", f"{r.low * 1e6:.0f}-{r.high * 1e6:.0f}", f"{r.ratio:.3f}"] for r in rows),
    )
    size = f"{who.WIDTH} wide, {who.LAYERS} layers"
    report([asdict(row) for row in rows], ("floatline", "torch"), options.json, threads=options.threads, model=size)


if __name__ == "__main__":
    main()

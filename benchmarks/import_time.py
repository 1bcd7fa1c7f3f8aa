"""How long imports and `floatline --help` take, in fresh interpreters, in turns.

    python benchmarks/import_time.py

Two baselines are taken in the same rounds: an interpreter that does nothing, and `import torch`. "beyond" is the
difference from one of them within a round. Files are in the page cache; the first start after boot takes longer for
all of them. Targets: `import floatline` 0.3 s beyond torch, `floatline --help` 1 s in all.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import print_table, progress, report

CASES: dict[str, tuple[str, str | None, float | None]] = {
    # what is run, as `python -c`: baseline, target in seconds beyond it
    "python": ("pass", None, None),
    "import torch": ("import torch", "python", None),
    "import floatline": ("import floatline", "python", 0.3),
    "import torch, floatline": ("import torch, floatline", "import torch", 0.3),
    "import torch; floatline.TrainStep": ("import torch, floatline; floatline.TrainStep", "import torch", 0.3),
    "floatline --help": ("from floatline.cli import main; main()", None, 1.0),
}


def seconds(code: str) -> float:
    """Return the wall time of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the times of each case, one a round; a first round fills the page cache and does not count."""
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, (code, _, _) in CASES.items():
            progress(f"round {number}/{rounds}: {name}")
            times[name].append(seconds(code))
    progress("")
    return {name: own[1:] for name, own in times.items()}


def summarize(times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Return a row a case: median seconds, median seconds beyond its baseline, target and whether it is reached."""
    rows: list[dict[str, object]] = []
    for name, (_, baseline, target) in CASES.items():
        floor = times[baseline] if baseline else [0.0] * len(times[name])
        beyond = statistics.median(own - under for own, under in zip(times[name], floor, strict=True))
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(times[name]),
                "baseline": baseline,
                "beyond": beyond if baseline else None,
                "target": target,
                "reached": None if target is None else beyond <= target,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="fresh interpreters a case (default 9)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    rows = summarize(measure(options.rounds))
    print_table(("", "seconds", "beyond", "of", "target", ""), map(cells, rows))
    report(rows, ("floatline", "torch", "numpy", "typer", "rich"), options.json)


def cells(row: dict[str, object]) -> list[str]:
    """Return a row of the table as text."""
    verdict = {None: "", True: "reached", False: "missed"}[row["reached"]]  # type: ignore[index]
    numbers = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("seconds", "beyond")]
    return [str(row["name"]), *numbers, str(row["baseline"] or ""), str(row["target"] or ""), verdict]


if __name__ == "__main__":
    main()

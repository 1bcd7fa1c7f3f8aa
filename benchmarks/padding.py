"""How much padding bucketing removes from a realistic distribution of lengths. Counting only: no machine matters.

    python benchmarks/padding.py
    python benchmarks/padding.py --lengths lengths.txt        # one number a line: your own data's

Without a file the lengths are log-normal like instruction data: 20,000 samples, mean about 200 tokens, at most 2048.
"before" is the same number of samples a batch in random order; for token budgets, random order cut under the same one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from common import print_table, report
from floatline.techniques import padding_report
from floatline.techniques.batches.buckets import bucketed_updates, cut_by_tokens


def instruction_lengths(count: int = 20_000) -> list[int]:
    """Return log-normal lengths, cut at 2048."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (4.9 + 0.9 * draws).exp().clamp(8, 2048).long().tolist()


def updates(lengths: list[int], batch_size: int, window: int) -> list[list[int]]:
    """Return an epoch's updates; a window of 1 is random order."""
    return bucketed_updates(lengths, batch_size=batch_size, window=window, seed=0, epoch=0)


def in_batches(lengths: list[int], batch_size: int, window: int) -> dict[str, Any]:
    """One row: whole updates, padded to their longest sample."""
    found = padding_report(lengths, updates(lengths, batch_size, window), baseline=updates(lengths, batch_size, 1))
    return {"what": f"batches of {batch_size}, window {window}", **numbers(found)}


def by_budget(lengths: list[int], batch_size: int, window: int, max_tokens: int) -> dict[str, Any]:
    """One row: updates cut into micro-batches under a budget of padded tokens."""
    cut = [
        part
        for update in updates(lengths, batch_size, window)
        for part in cut_by_tokens(sorted(update, key=lengths.__getitem__), lengths, max_tokens)
    ]
    before = [part for update in updates(lengths, batch_size, 1) for part in greedy(update, lengths, max_tokens)]
    found = padding_report(lengths, cut, baseline=before)
    return {"what": f"updates of {batch_size}, window {window}, {max_tokens} tokens a micro-batch", **numbers(found)}


def greedy(update: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Cut an update in the order of its samples' indices, which knows nothing of lengths, when the budget is full."""
    parts: list[list[int]] = [[]]
    for index in sorted(update):
        grown = [*parts[-1], index]
        if parts[-1] and len(grown) * max(lengths[i] for i in grown) > max_tokens:
            parts.append([index])
        else:
            parts[-1] = grown
    return parts


def numbers(found: Any) -> dict[str, float]:
    return {
        "before": found.baseline_padding / found.baseline_padded_tokens,
        "after": found.padding / found.padded_tokens,
        "removed": found.removed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=Path, help="file with one length a line")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args()
    lengths = [int(word) for word in options.lengths.read_text().split()] if options.lengths else instruction_lengths()
    rows = [in_batches(lengths, 8, 50), *(in_batches(lengths, 32, window) for window in (50, 10, 5, 2))]
    longest = max(2 * max(lengths), 4096)
    rows += [by_budget(lengths, 64, 1, longest), by_budget(lengths, 64, 50, longest)]
    shown = [[row["what"], *(f"{row[key]:.1%}" for key in ("before", "after", "removed"))] for row in rows]
    print_table(("", "padding before", "after", "removed"), shown)
    mean = sum(lengths) / len(lengths)
    report(rows, ("floatline", "torch"), options.json, samples=len(lengths), mean_length=mean, longest=max(lengths))


if __name__ == "__main__":
    main()

"""Records as the gradient monitor writes them, without training."""

from __future__ import annotations

import math
from typing import Any


def point(step: int, **changes: Any) -> dict[str, Any]:
    norm = 1 + 0.3 * math.sin(step)
    line = {"step": step, "updates": 1, "norm": norm, "top_norm": norm, "looked": 1, "largest": norm / 9}
    return {**line, "mean": norm / 900, "bad_updates": 0, "bad_parameters": 0, "bad_elements": 0} | changes


def bad_point(step: int) -> dict[str, Any]:
    nan = dict.fromkeys(("norm", "top_norm", "largest", "mean"), math.nan)
    return point(step, looked=0, bad_updates=1, bad_parameters=2, bad_elements=96, **nan)


def record(updates: int = 40, *, bad: tuple[int, ...] = (), layers: int = 4, **changes: Any) -> dict[str, Any]:
    points = [bad_point(step) if step in bad else point(step) for step in range(1, updates + 1)]
    names = ["embed", *(f"layers.{place}" for place in range(layers - 1))][:layers]
    rows = [[0.1 * (place + 1) for place in range(layers)] for _ in range(1, updates + 1, 10)]
    for step in bad:
        rows[(step - 1) // 10][-1] = math.nan
    advice = {
        "text": "Gradient norms of 40 updates: half lie below 1.",
        "suggested": 1.3,
        "candidates": [
            {"value": 1.0, "share": 0.5, "what": "in use"},
            {"value": 1.3, "share": 0.025, "what": "90 % lie below"},
        ],
    }
    return {
        "version": 1,
        "per": "layer",
        "max_grad_norm": 1.0,
        "step": updates,
        "large_updates": 0,
        "points": {"stretch": 1, "kept": points},
        "rows": {"every": 10, "names": names, "steps": list(range(1, updates + 1, 10)), "norms": rows},
        "distribution": {},
        "advice": advice,
    } | changes

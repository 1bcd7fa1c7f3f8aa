"""Curves before they are drawn: smoothing, thinning, quantiles.

Pure functions over lists of floats, in which NaN and infinity mark updates without a usable value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from floatline.report.records import NAN


def finite(values: Sequence[float]) -> list[float]:
    """Return the finite values, in order."""
    return [value for value in values if math.isfinite(value)]


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile of the finite values by linear interpolation, NaN when there are none.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([], 0.5)
    (2.5, nan)
    """
    ordered = sorted(finite(values))
    if not ordered:
        return NAN
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def smooth(values: Sequence[float], window: float) -> list[float]:
    """Return the exponential moving average, corrected for its start; non-finite values are passed over.

    Args:
        values: One value an update.
        window: About how many updates weigh in; 1 changes nothing.

    Returns:
        As many values; NaN up to the first finite one.

    >>> smooth([1.0, float("nan"), 1.0], window=4)
    [1.0, 1.0, 1.0]
    """
    keep = 1 - 1 / max(window, 1)
    total = weight = 0.0
    result = []
    for value in values:
        if math.isfinite(value):
            total = keep * total + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        result.append(total / weight if weight else NAN)
    return result


def thin(xs: Sequence[float], ys: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """Return at most about `points` points that draw the same picture: minimum and maximum of each bucket.

    Spikes survive, unlike with a stride. A bucket without a finite value becomes a gap.

    >>> thin([1, 2, 3, 4, 5, 6], [0.0, 9.0, 1.0, 1.0, 1.0, 2.0], 4)
    ([1.0, 2.0, 4.0, 6.0], [0.0, 9.0, 1.0, 2.0])
    """
    if len(xs) <= points:
        return [float(x) for x in xs], [y if math.isfinite(y) else NAN for y in ys]
    buckets = max(points // 2, 1)
    out_x: list[float] = []
    out_y: list[float] = []
    for bucket in range(buckets):
        start, end = bucket * len(xs) // buckets, (bucket + 1) * len(xs) // buckets
        good = [index for index in range(start, end) if math.isfinite(ys[index])]
        picks = sorted({min(good, key=ys.__getitem__), max(good, key=ys.__getitem__)}) if good else [start]
        out_x += [float(xs[index]) for index in picks]
        out_y += [ys[index] if math.isfinite(ys[index]) else NAN for index in picks]
    return out_x, out_y


def thin_marks(xs: Sequence[float], points: int) -> list[float]:
    """Return at most `points` of the places to mark, spread over all of them, first and last included."""
    if len(xs) <= points:
        return [float(x) for x in xs]
    return [float(xs[round(index * (len(xs) - 1) / (points - 1))]) for index in range(points)]


def spans_decades(values: Sequence[float], ratio: float = 20.0) -> bool:
    """Whether a log axis reads better: all positive, and the middle nine tenths span more than `ratio`."""
    known = finite(values)
    return bool(known) and min(known) > 0 and quantile(known, 0.95) > ratio * quantile(known, 0.05)

"""Norms by layer over a run as a heat map: one strip of pixels a layer, beside its name.

A strip is a picture one pixel high that the page stretches, so names stand in the page's own text, escaped and
searchable, however many layers there are. Colours are matplotlib's viridis over the logarithm of the norm; red is NaN
or Inf, and no colour is no gradient.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from itertools import pairwise

from floatline.report.curves import quantile
from floatline.report.gradients import Gradients
from floatline.report.need import need
from floatline.report.units import number_text, times

ROWS = 64
COLUMNS = 400
RED = (200, 48, 60, 255)
NOTHING = (0, 0, 0, 0)
Colour = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One layer: its name, its course as a picture, and the last norm as text; `bad` where it was not finite once."""

    name: str
    uri: str
    last: str
    bad: bool


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The strips of all layers, the ends of the time axis and of the colours."""

    title: str
    strips: tuple[Strip, ...]
    first: str
    last: str
    low: str
    high: str
    bar: str
    caption: str
    bad: bool


def heat_map(gradients: Gradients, *, most: int = ROWS) -> HeatMap | None:
    """Draw norms by layer, or by parameter, over the run.

    Args:
        gradients: Of one run.
        most: Strips at most; those that were not finite come first, then those with the largest norms.

    Returns:
        The map, None where no row was kept.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not gradients.rows:
        return None
    shown = choose(gradients, most)
    low, high = span(gradients, shown)
    columns = list(zip(*gradients.rows))
    strips = tuple(
        Strip(
            name=gradients.names[place],
            uri=_picture([colour(value, low, high) for value in _fit(columns[place])]),
            last=_last(columns[place]),
            bad=any(is_bad(value) for value in columns[place]),
        )
        for place in shown
    )
    left_out = len(gradients.names) - len(shown)
    what = "layer" if gradients.per == "layer" else "parameter"
    caption = f"2-norm of each {what}'s gradient; {times(len(gradients.rows), 'column')}, oldest on the left."
    if left_out:
        caption += f" {times(left_out, what)} with smaller norms left out."
    ramp = [math.exp(math.log(low) + (math.log(high) - math.log(low)) * i / 99) for i in range(100)]
    return HeatMap(
        title=f"Norm by {what}",
        strips=strips,
        first=f"update {gradients.steps[0]}",
        last=f"update {gradients.steps[-1]}",
        low=number_text(low),
        high=number_text(high),
        bar=_picture([colour(value, low, high) for value in ramp]),
        caption=caption,
        bad=any(strip.bad for strip in strips),
    )


def choose(gradients: Gradients, most: int) -> list[int]:
    """Return which names to show, in the model's order."""

    def weight(place: int) -> tuple[bool, float]:
        column = [row[place] for row in gradients.rows]
        return any(map(is_bad, column)), max((value for value in column if math.isfinite(value)), default=0.0)

    order = sorted(range(len(gradients.names)), key=weight, reverse=True)
    return sorted(order[:most])


def is_bad(value: float) -> bool:
    """Whether a norm is NaN or infinite."""
    return not math.isfinite(value)


def span(gradients: Gradients, shown: list[int]) -> tuple[float, float]:
    """Return the norms at the ends of the colours: nearly all of the positive ones lie between them."""
    known = [row[place] for row in gradients.rows for place in shown if 0 < row[place] < math.inf]
    low, high = quantile(known, 0.01), quantile(known, 0.99)
    if not known or not low < high:
        middle = known[0] if known else 1.0
        return middle / 2, middle * 2
    return low, high


def colour(value: float, low: float, high: float) -> Colour:
    """Return the colour of a norm: red if it is not finite, none without a gradient (below 0)."""
    if is_bad(value):
        return RED
    if value < 0:
        return NOTHING
    share = 0.0 if value <= low else (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    red, green, blue, _ = need("matplotlib").colormaps["viridis"](min(max(share, 0.0), 1.0))
    return round(255 * red), round(255 * green), round(255 * blue), 255


def _fit(column: tuple[float, ...]) -> list[float]:
    """Return at most `COLUMNS` norms, the largest of each bucket; what is not finite is kept."""
    if len(column) <= COLUMNS:
        return list(column)
    ends = [index * len(column) // COLUMNS for index in range(COLUMNS + 1)]
    buckets = [column[start:end] for start, end in pairwise(ends)]
    return [next(filter(is_bad, bucket), max(bucket)) for bucket in buckets]


def _last(column: tuple[float, ...]) -> str:
    value = column[-1]
    if math.isnan(value):
        return "NaN"
    return "Inf" if is_bad(value) else number_text(value) if value >= 0 else "none"


def _picture(pixels: list[Colour]) -> str:
    """Return pixels in one line as a data URI."""
    image_module = need("PIL.Image")
    image = image_module.new("RGBA", (len(pixels), 1))
    image.putdata(pixels)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

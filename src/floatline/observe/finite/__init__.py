"""Find the first op of a step that made a value that is not finite; see watch.py."""

from floatline.observe.finite.numbers import Numbers, bad_rows, has_nan, is_bad, numbers, parts_of, storage_of
from floatline.observe.finite.origins import Kind, Made, Origin, Spot
from floatline.observe.finite.places import Place
from floatline.observe.finite.watch import Watch
from floatline.observe.finite.watching import backward, watching
from floatline.observe.module_stack import plain_name

__all__ = [
    "Kind",
    "Made",
    "Numbers",
    "Origin",
    "Place",
    "Spot",
    "Watch",
    "backward",
    "bad_rows",
    "has_nan",
    "is_bad",
    "numbers",
    "parts_of",
    "plain_name",
    "storage_of",
    "watching",
]

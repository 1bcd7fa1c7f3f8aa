import base64
import io
import math

import pytest
from PIL import Image

from floatline.report.gradients import Gradients
from floatline.report.heat_map import COLUMNS, NOTHING, RED, colour, heat_map

from .gradient_records import record


def with_rows(rows: list[list[float]], **changes: object) -> Gradients:
    names = [f"p{place}" for place in range(len(rows[0]))]
    steps = list(range(1, 10 * len(rows), 10))
    return Gradients.read(record(rows={"names": names, "steps": steps, "norms": rows}, **changes))


def pixels(uri: str) -> list[tuple[int, ...]]:
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    assert image.size[1] == 1
    return [image.convert("RGBA").getpixel((x, 0)) for x in range(image.size[0])]  # type: ignore[misc]


def test_a_strip_a_layer_and_a_pixel_a_row() -> None:
    shown = heat_map(with_rows([[0.1, 1.0], [0.1, math.nan], [10.0, -1.0]]))
    assert shown is not None
    assert [strip.name for strip in shown.strips] == ["p0", "p1"]
    first, second = (pixels(strip.uri) for strip in shown.strips)
    assert first[0] == first[1] != first[2]
    assert second[1] == RED and second[2][3] == NOTHING[3] == 0
    assert [strip.last for strip in shown.strips] == ["10", "none"]
    assert [strip.bad for strip in shown.strips] == [False, True] and shown.bad
    assert (shown.first, shown.last) == ("update 1", "update 21")


def test_larger_norms_are_brighter() -> None:
    brightness = [sum(colour(value, 1e-3, 1e3)[:3]) for value in (0.0, 1e-3, 1.0, 1e3, 1e9)]
    assert brightness == sorted(brightness) and brightness[0] == brightness[1] and brightness[3] == brightness[4]


def test_of_very_many_the_bad_and_the_largest_stay_in_the_models_order() -> None:
    row = [1.0] * 100
    row[7], row[50], row[90] = math.inf, 9.0, 5.0
    shown = heat_map(with_rows([row], per="parameter"), most=3)
    assert shown is not None and [strip.name for strip in shown.strips] == ["p7", "p50", "p90"]
    assert "97 parameters with smaller norms left out" in shown.caption and shown.title == "Norm by parameter"


def test_long_runs_keep_their_spikes_and_faults() -> None:
    rows = [[1.0] for _ in range(3 * COLUMNS)]
    rows[100], rows[700] = [100.0], [math.nan]
    shown = heat_map(with_rows(rows))
    assert shown is not None
    line = pixels(shown.strips[0].uri)
    assert len(line) == COLUMNS and line[700 // 3] == RED and len(set(line)) == 3


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, math.nan, math.inf])
def test_rows_of_one_value(value: float) -> None:
    shown = heat_map(with_rows([[value]] * 3))
    assert shown is not None and len(pixels(shown.strips[0].uri)) == 3


def test_nothing_kept() -> None:
    assert heat_map(Gradients.read({})) is None

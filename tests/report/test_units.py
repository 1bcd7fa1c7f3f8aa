import math

import pytest

from floatline.report import units


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.bytes_text, 0, "0 B"),
        (units.bytes_text, 1023, "1023 B"),
        (units.bytes_text, 812 * 2**20, "812 MiB"),
        (units.bytes_text, 1.5 * 2**30, "1.50 GiB"),
        (units.bytes_text, 3000 * 2**40, "3000 TiB"),
        (units.seconds_text, 0, "0 ms"),
        (units.seconds_text, 2e-5, "20.0 µs"),
        (units.seconds_text, 0.0123, "12.3 ms"),
        (units.seconds_text, 59.99, "60.0 s"),
        (units.seconds_text, 125.3, "2 min 05 s"),
        (units.seconds_text, 3599.9, "1 h 00 min"),
        (units.seconds_text, 200_000, "2 d 7 h"),
        (units.percent_text, 0.0, "0.0 %"),
        (units.percent_text, 1.0, "100 %"),
        (units.percent_text, 0.9999, "99.9 %"),
        (units.count_text, 9999, "9999"),
        (units.count_text, 1_437_824, "1.44 M"),
        (units.rate_text, 7512.3, "7512 tokens/s"),
        (units.number_text, 0, "0"),
        (units.number_text, -0.5, "-0.5"),
        (units.number_text, 3e8, "3e+08"),
        (units.number_text, 65536.0, "65536"),
        (units.power_of_two_text, 65536.0, "2¹⁶"),
        (units.power_of_two_text, 3.0, "3"),
    ],
)
def test_reads_well(function, value, text) -> None:
    assert function(value) == text


@pytest.mark.parametrize("name", [name for name in dir(units) if name.endswith("_text")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_dash(name: str, value: float) -> None:
    assert getattr(units, name)(value) == units.DASH

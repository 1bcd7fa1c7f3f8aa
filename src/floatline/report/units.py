"""Numbers as people read them: GiB, ms, tokens/s.

Files and JSON hold plain bytes and seconds; only what a person looks at goes through here. Whatever is missing or not
finite prints as a dash, so that a partial run never shows `nan`.
"""

from __future__ import annotations

import math

DASH = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number_text(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, scientific only where plain would be unreadable.

    >>> number_text(0.12345), number_text(1234.5), number_text(2e-6), number_text(None)
    ('0.123', '1234', '2e-06', '–')
    """
    if value is None or not _known(value):
        return DASH
    if value and (abs(value) >= 10**6 or abs(value) < 1e-4):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{exponent}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.0f}" if whole >= digits else f"{value:.{digits}g}"


def count_text(value: float | None) -> str:
    """Return a count with k, M or G above ten thousand.

    >>> count_text(4000), count_text(100_000), count_text(1_437_824)
    ('4000', '100 k', '1.44 M')
    """
    if value is None or not _known(value):
        return DASH
    if abs(value) < 10_000:
        return f"{value:.0f}"
    power = min(int(math.log10(abs(value)) // 3), 4)
    return f"{value / 1000**power:.3g} {' kMGT'[power]}"


def times(count: int, noun: str) -> str:
    """Return how many of something, in the singular where it is one.

    >>> times(1, "fault"), times(3, "fault")
    ('1 fault', '3 faults')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_text(value: float | None) -> str:
    """Return bytes in the binary unit that leaves one to four digits before the point.

    >>> bytes_text(512), bytes_text(123_456_789), bytes_text(3 * 2**30)
    ('512 B', '118 MiB', '3.00 GiB')
    """
    if value is None or not _known(value):
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:#.3g} {unit}"


def seconds_text(value: float | None) -> str:
    """Return a duration, from microseconds to days, with two or three digits.

    >>> seconds_text(0.1234), seconds_text(75), seconds_text(200), seconds_text(19_000)
    ('123 ms', '75.0 s', '3 min 20 s', '5 h 16 min')
    """
    if value is None or not _known(value):
        return DASH
    if value < 1:
        small, unit = (value * 1e3, "ms") if value >= 1e-3 or value == 0 else (value * 1e6, "µs")
        return f"{small:.0f} {unit}" if small >= 100 or small == 0 else f"{small:#.3g} {unit}"
    if value < 99.95:
        return f"{value:#.3g} s"
    whole = round(value)
    days, hours, minutes, seconds = whole // 86400, whole % 86400 // 3600, whole % 3600 // 60, whole % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def percent_text(share: float | None) -> str:
    """Return a share of one as a percentage; only an exact 1 reads 100 %.

    >>> percent_text(0.9825), percent_text(0.99999), percent_text(1.0)
    ('98.2 %', '99.9 %', '100 %')
    """
    if share is None or not _known(share):
        return DASH
    if share == 1:
        return "100 %"
    return f"{min(share * 100, 99.9) if share < 1 else share * 100:.1f} %"


def rate_text(value: float | None, unit: str = "tokens/s") -> str:
    """Return a rate with its unit.

    >>> rate_text(7512.3)
    '7512 tokens/s'
    """
    return f"{count_text(value)} {unit}" if _known(value) else DASH


def power_of_two_text(value: float) -> str:
    """Return a loss scale as the power of two it is.

    >>> power_of_two_text(65536.0), power_of_two_text(0.5)
    ('2¹⁶', '2⁻¹')
    """
    if not _known(value) or value <= 0:
        return number_text(value)
    exponent = math.log2(value)
    return f"2{str(round(exponent)).translate(_SUPERSCRIPT)}" if exponent == round(exponent) else number_text(value)

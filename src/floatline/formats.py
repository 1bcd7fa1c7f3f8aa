"""Number formats: range, spacing and bytes, computed from the bit layout.

A binary floating-point format with `e` exponent bits, `m` mantissa bits and bias `b = 2^(e-1) - 1` holds

    normal      (-1)^s * 2^(E-b) * (1 + M/2^m)      1 <= E <= largest exponent
    subnormal   (-1)^s * 2^(1-b) * (M/2^m)          E = 0

so everything in the table follows from `(e, m)` and from what the format does with its topmost codes. Three ways exist:
IEEE formats spend the whole top exponent on inf and NaN; the "fn" (finite) formats have no inf and at most one NaN
code; `e8m0` is a bare exponent, used as the scale of a block.

Two traps that the table avoids: `torch.finfo(...).tiny` is the smallest *normal* number, not the smallest positive one,
and subnormals are only there when the hardware does not flush them to zero.

Not covered: integer formats, the "fnuz" fp8 variants, block formats as a whole (MXFP8, NVFP4 are e4m3/e2m1 elements
plus a scale format of this table).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from floatline.errors import ConfigError, did_you_mean


class TopCodes(Enum):
    """What a format does with the codes of its largest exponent."""

    IEEE = "inf and NaN"
    ONE_NAN = "one NaN, no inf"
    FINITE = "no NaN, no inf"


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """One floating-point format.

    Args:
        name: The field's short name, as in a policy string (`fp32`, `bf16`, ...).
        exponent_bits: Width of the exponent field.
        mantissa_bits: Width of the stored mantissa field (the leading 1 is not stored).
        storage_bits: Bits one element occupies in memory; tf32 is stored as fp32.
        top: What the codes of the largest exponent mean.
        signed: False for the scale format e8m0, which has no sign, no zero and no subnormals.
        torch_name: Attribute of `torch` that is this dtype, empty when torch has none.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    storage_bits: int
    top: TopCodes = TopCodes.IEEE
    signed: bool = True
    torch_name: str = ""

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def max(self) -> float:
        """Largest finite value."""
        top_exponent = 2**self.exponent_bits - 1
        if self.top is TopCodes.IEEE:
            return (2 - 2.0**-self.mantissa_bits) * 2.0 ** (top_exponent - 1 - self.bias)
        if self.top is TopCodes.FINITE:
            return (2 - 2.0**-self.mantissa_bits) * 2.0 ** (top_exponent - self.bias)
        if self.mantissa_bits == 0:  # the NaN takes the whole top exponent
            return 2.0 ** (top_exponent - 1 - self.bias)
        return (2 - 2 * 2.0**-self.mantissa_bits) * 2.0 ** (top_exponent - self.bias)

    @property
    def min_normal(self) -> float:
        """Smallest positive value with full precision."""
        lowest_exponent = 1 if self.signed else 0
        return 2.0 ** (lowest_exponent - self.bias)

    @property
    def min_subnormal(self) -> float | None:
        """Smallest positive value, None for formats without subnormals (tf32 in hardware, e8m0)."""
        if not self.signed or self.name == "tf32":
            return None
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def eps(self) -> float | None:
        """Distance from 1 to the next larger value, None for e8m0, whose next value is 2."""
        return 2.0**-self.mantissa_bits if self.signed else None

    @property
    def exact_integers(self) -> int | None:
        """All integers up to this one are exact: 2^(m+1), at most the format's maximum."""
        return int(min(2 ** (self.mantissa_bits + 1), self.max)) if self.signed else None

    @property
    def bytes(self) -> float:
        """Bytes of one element in memory."""
        return self.storage_bits / 8

    def spacing(self, value: float) -> float:
        """Return the distance between neighbours (one ulp) at `value`, which must be finite and in range.

        >>> FORMATS["bf16"].spacing(256.0)
        2.0
        """
        if not abs(value) <= self.max:
            raise ConfigError(f"{value} is outside of {self.name} (largest finite value {self.max:g})")
        exponent = max(_exponent(abs(value)), _exponent(self.min_normal))
        return 2.0 ** (exponent - self.mantissa_bits)


def _exponent(value: float) -> int:
    from math import frexp

    return frexp(value)[1] - 1 if value else -(10**6)


def _table(*formats: NumberFormat) -> dict[str, NumberFormat]:
    return {fmt.name: fmt for fmt in formats}


def _make(name: str, exponent: int, mantissa: int, storage: int, torch_name: str, **extra: object) -> NumberFormat:
    return NumberFormat(
        name=name,
        exponent_bits=exponent,
        mantissa_bits=mantissa,
        storage_bits=storage,
        torch_name=torch_name,
        **extra,  # type: ignore[arg-type]
    )


FORMATS: dict[str, NumberFormat] = _table(
    _make("fp64", 11, 52, 64, "float64"),
    _make("fp32", 8, 23, 32, "float32"),
    _make("tf32", 8, 10, 32, ""),
    _make("fp16", 5, 10, 16, "float16"),
    _make("bf16", 8, 7, 16, "bfloat16"),
    _make("fp8-e4m3", 4, 3, 8, "float8_e4m3fn", top=TopCodes.ONE_NAN),
    _make("fp8-e5m2", 5, 2, 8, "float8_e5m2"),
    _make("fp4-e2m1", 2, 1, 4, "float4_e2m1fn_x2", top=TopCodes.FINITE),
    _make("e8m0", 8, 0, 8, "float8_e8m0fnu", top=TopCodes.ONE_NAN, signed=False),
)


def number_format(name: str) -> NumberFormat:
    """Look a format up by name.

    Raises:
        ConfigError: The name is not in `FORMATS`.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ConfigError(f"unknown number format {name!r}", hint=did_you_mean(name, FORMATS)) from None


def format_rows() -> list[dict[str, object]]:
    """Return the table of formats as plain rows, for `floatline formats` and its `--json`."""
    return [
        {
            "format": fmt.name,
            "exponent_bits": fmt.exponent_bits,
            "mantissa_bits": fmt.mantissa_bits,
            "bytes": fmt.bytes,
            "max": fmt.max,
            "min_normal": fmt.min_normal,
            "min_subnormal": fmt.min_subnormal,
            "eps": fmt.eps,
            "exact_integers": fmt.exact_integers,
            "top_codes": fmt.top.value,
        }
        for fmt in FORMATS.values()
    ]


def format_text() -> str:
    """Return the table of formats as text, a line a format."""
    rows = format_rows()
    header: dict[str, object] = {key: key for key in rows[0]}
    return "\n".join("  ".join(_cell(key, value) for key, value in row.items()).rstrip() for row in [header, *rows])


def _cell(key: str, value: object) -> str:
    width = {"format": 9, "exponent_bits": 13, "exact_integers": 16}.get(key, 13)
    if isinstance(value, float):
        value = f"{value:.6g}"
    shown = "-" if value is None else str(value)
    return shown.ljust(width) if key in {"format", "top_codes"} else shown.rjust(width)

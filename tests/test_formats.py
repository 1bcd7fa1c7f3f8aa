"""Formats are computed from bit widths; here they are held against torch and against the bits themselves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError
from floatline.formats import FORMATS, format_rows, number_format

IN_TORCH = [fmt for fmt in FORMATS.values() if fmt.torch_name and fmt.signed and fmt.storage_bits >= 8]


@pytest.mark.parametrize("fmt", IN_TORCH, ids=lambda fmt: fmt.name)
def test_agrees_with_torch(fmt):
    info = torch.finfo(getattr(torch, fmt.torch_name))
    assert (fmt.max, fmt.min_normal, fmt.eps, fmt.storage_bits) == (info.max, info.tiny, info.eps, info.bits)


@pytest.mark.parametrize("fmt", IN_TORCH, ids=lambda fmt: fmt.name)
def test_smallest_code_is_the_smallest_subnormal(fmt):
    integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[fmt.storage_bits]
    smallest = torch.ones((), dtype=integer).view(getattr(torch, fmt.torch_name))
    assert smallest.double().item() == fmt.min_subnormal


@pytest.mark.parametrize(
    ("name", "largest", "smallest", "integers"),
    [
        ("fp8-e4m3", 448, 2**-9, 16),
        ("fp8-e5m2", 57344, 2**-16, 8),
        ("fp4-e2m1", 6, 0.5, 4),
        ("bf16", 3.3895313892515355e38, 9.183549615799121e-41, 256),
        ("fp16", 65504, 2**-24, 2048),
    ],
)
def test_published_values(name, largest, smallest, integers):
    fmt = number_format(name)
    assert (fmt.max, fmt.min_subnormal, fmt.exact_integers) == (largest, smallest, integers)


def test_tf32_has_fp32_range_with_fp16_precision():
    tf32 = FORMATS["tf32"]
    assert tf32.min_normal == FORMATS["fp32"].min_normal
    assert tf32.eps == FORMATS["fp16"].eps
    assert tf32.bytes == 4


def test_scale_format_is_powers_of_two():
    scale = FORMATS["e8m0"]
    assert (scale.max, scale.min_normal, scale.eps) == (2.0**127, 2.0**-127, None)


@given(st.floats(min_value=2**-14, max_value=60000), st.sampled_from(["fp16", "bf16", "fp32"]))
def test_spacing_is_the_distance_to_the_next_value(value, name):
    fmt = FORMATS[name]
    number = torch.tensor(value, dtype=getattr(torch, fmt.torch_name))
    above = torch.nextafter(number, torch.tensor(float("inf"), dtype=number.dtype))
    assert fmt.spacing(number.item()) == above.double().item() - number.double().item()


def test_errors_name_value_and_way_out():
    with pytest.raises(ConfigError, match=r"unknown number format 'bf61'\nhint: did you mean 'bf16'"):
        number_format("bf61")
    with pytest.raises(ConfigError, match=r"70000.*fp16.*65504"):
        FORMATS["fp16"].spacing(70000.0)


def test_rows_have_every_format():
    assert [row["format"] for row in format_rows()] == list(FORMATS)

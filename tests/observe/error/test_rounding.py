"""Rounding is held bit for bit against torch's casts, and against the grid itself where torch has no dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError
from floatline.formats import FORMATS
from floatline.observe.error.rounding import round_to

CAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}
ON_THE_GRID = ["tf32", "fp16", "bf16", "fp8-e4m3", "fp8-e5m2", "fp4-e2m1", "e8m0"]
WIDE = [torch.float32, torch.float64]
any_float32 = st.lists(st.floats(width=32), min_size=1, max_size=40)


def same_bits(left, right):
    integer = {4: torch.int32, 8: torch.int64}[left.element_size()]
    both_nan = left.isnan() & right.isnan()
    assert ((left.view(integer) == right.view(integer)) | both_nan).all(), (left, right)


def all_codes(name):
    """Every value of an 8- or 16-bit format of torch, as fp32."""
    dtype = CAST[name]
    integer = torch.uint8 if dtype.itemsize == 1 else torch.int16
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to(torch.uint8 if integer is torch.uint8 else torch.int32)
    return codes.to(integer).view(dtype).float()


def general(tensor, name, **settings):
    """Round through fp64, so that the general way is tested and not torch's cast; fp8 by way of fp32 must agree."""
    rounded = round_to(tensor.double(), name, **settings).float()
    if name.startswith("fp8") and not settings:
        same_bits(round_to(tensor, name), rounded)
    return rounded


@pytest.mark.parametrize("name", CAST)
@given(values=any_float32)
def test_equals_torchs_cast_bit_for_bit(name, values):
    tensor = torch.tensor(values)
    saturates = name == "fp8-e4m3"
    if saturates:  # what torch's cast does out of range depends on its version
        tensor = tensor.clamp(-448, 448)
    expected = tensor.to(CAST[name]).float()
    same_bits(round_to(tensor, name), expected)
    same_bits(general(tensor, name), expected)


@pytest.mark.parametrize("name", CAST)
def test_halfway_points_and_their_neighbours(name):
    """Every tie between two neighbours of the format, and the fp32 values next to it, go where torch sends them."""
    codes = all_codes(name)
    codes = codes[codes.isfinite()].unique()  # sorted
    ties = ((codes[1:].double() + codes[:-1].double()) / 2).float()
    infinity = torch.full_like(ties, torch.inf)
    points = torch.cat([codes, ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)])
    points = points[points.abs() <= codes.max()]
    same_bits(general(points, name), points.to(CAST[name]).float())


@pytest.mark.parametrize("name", CAST)
def test_values_of_the_format_stay(name):
    codes = all_codes(name)
    same_bits(general(codes, name), codes)
    same_bits(general(codes[codes.isfinite()], name, stochastic=True), codes[codes.isfinite()])


@given(values=st.lists(st.floats(), min_size=1, max_size=20))
def test_fp64_to_fp32_is_torchs_cast(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    same_bits(round_to(tensor, "fp32"), tensor.float().double())
    same_bits(round_to(tensor, "fp64"), tensor)


def test_fp64_is_rounded_once():
    """1 + 2^-8 + 2^-40 lies above a tie of bf16; by way of fp32 the last bit is lost and the tie goes down."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert value.float().to(torch.bfloat16).item() == 1
    assert round_to(value, "bf16").item() == 1 + 2.0**-7


@given(values=st.lists(st.floats(min_value=2.0**-126, width=32), min_size=1, max_size=20))
def test_e8m0_is_torchs(values):
    """Among fp32's subnormals torch's cast does not go to the nearest power of two (2.13: 1.14 * 2^-127 to 2^-126)."""
    tensor = torch.tensor(values)
    same_bits(round_to(tensor, "e8m0"), tensor.to(torch.float8_e8m0fnu).float())


def test_e8m0_below_one_step():
    low = torch.tensor([0.0, 2.0**-149, 1.14 * 2.0**-127, 1.6 * 2.0**-127, -1.0])
    same_bits(round_to(low, "e8m0"), torch.tensor([2.0**-127, 2.0**-127, 2.0**-127, 2.0**-126, torch.nan]))


def test_e2m1_knows_its_sixteen_values():
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    same_bits(round_to(values, "fp4-e2m1"), values)
    odd = torch.tensor([0.25, 0.75, 1.25, 2.5, 5, 5.1, 100, torch.inf, -7, torch.nan])
    same_bits(round_to(odd, "fp4-e2m1"), torch.tensor([0.0, 1, 1, 2, 4, 6, 6, 6, -6, torch.nan]))


def test_tf32_keeps_ten_bits_and_has_no_subnormals():
    tensor = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-127, 2.0**-126, -(2.0**-127)])
    same_bits(round_to(tensor, "tf32"), torch.tensor([1 + 2.0**-10, 1.0, 1 + 2.0**-9, 0.0, 2.0**-126, -0.0]))


@pytest.mark.parametrize(
    ("name", "value", "plain", "saturated"),
    [
        ("fp16", 65519.0, 65504, 65504),
        ("fp16", 65520.0, torch.inf, 65504),
        ("bf16", -3.4e38, -torch.inf, -FORMATS["bf16"].max),
        ("fp8-e5m2", 61440.0, torch.inf, 57344),
        ("fp8-e4m3", 463.0, 448, 448),
        ("fp8-e4m3", 465.0, torch.nan, 448),
        ("fp8-e4m3", -torch.inf, torch.nan, -448),
        ("e8m0", 1.6 * 2.0**127, torch.nan, 2.0**127),
        ("fp32", torch.inf, torch.inf, FORMATS["fp32"].max),
    ],
)
@pytest.mark.parametrize("dtype", WIDE)
def test_overflow(name, value, plain, saturated, dtype):
    tensor = torch.tensor([value], dtype=dtype)
    same_bits(round_to(tensor, name), torch.tensor([plain], dtype=dtype))
    same_bits(round_to(tensor, name, saturate=True), torch.tensor([saturated], dtype=dtype))


@pytest.mark.parametrize("name", ON_THE_GRID)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_nearest_beats_its_neighbours(name, values):
    """Without looking at torch: the result is a value of the format, no further away than half a step."""
    fmt = FORMATS[name]
    tensor = torch.tensor(values, dtype=torch.float64).clamp(0 if name == "e8m0" else -fmt.max, fmt.max)
    rounded = round_to(tensor, name)
    same_bits(round_to(rounded, name), rounded)
    for value, result in zip(tensor.tolist(), rounded.tolist(), strict=True):
        below = abs(value) < fmt.min_normal and fmt.min_subnormal is None
        assert abs(result - value) <= (fmt.min_normal if below else fmt.spacing(value) / 2)


@pytest.mark.parametrize("name", ["tf32", "fp16", "bf16", "fp8-e4m3", "fp8-e5m2", "fp4-e2m1"])
def test_stochastic_rounding_is_unbiased(name):
    fmt = FORMATS[name]
    step = 2.0**-fmt.mantissa_bits
    for value in (1 + 0.3 * step, -(1 + 0.9 * step)):
        tensor = torch.full((40_000,), value, dtype=torch.float64)
        rounded = round_to(tensor, name, stochastic=True, generator=torch.Generator().manual_seed(0))
        assert set(rounded.abs().tolist()) == {1.0, 1 + step}
        # the standard deviation of the mean is step * sqrt(p (1 - p) / n) <= step / 400
        assert abs(rounded.mean().item() - value) < 4 * step / 400


def test_stochastic_rounding_of_subnormals_is_unbiased_and_repeats():
    tensor = torch.full((40_000,), 2.0**-9 * 0.25)  # a quarter of e4m3's smallest value
    first = round_to(tensor, "fp8-e4m3", stochastic=True, generator=torch.Generator().manual_seed(1))
    again = round_to(tensor, "fp8-e4m3", stochastic=True, generator=torch.Generator().manual_seed(1))
    assert set(first.tolist()) == {0.0, 2.0**-9}
    assert abs(first.mean().item() / 2.0**-9 - 0.25) < 4 * 0.5 / 200
    same_bits(first, again)


@pytest.mark.parametrize("dtype", WIDE)
def test_dtype_shape_and_input_are_kept(dtype):
    tensor = torch.randn(3, 0, 2, dtype=dtype, requires_grad=True)
    assert (round_to(tensor, "bf16").dtype, round_to(tensor, "tf32").shape) == (dtype, (3, 0, 2))
    strided = torch.randn(8, 6, dtype=dtype).t()
    before = strided.clone()
    result = round_to(strided, "fp8-e5m2")
    assert torch.equal(strided, before)
    assert not result.requires_grad
    assert torch.equal(result, round_to(before.contiguous(), "fp8-e5m2"))


def test_errors_say_what_is_allowed():
    with pytest.raises(ConfigError, match=r"cannot round a tensor of torch.bfloat16; allowed are float32 and float64"):
        round_to(torch.ones(2, dtype=torch.bfloat16), "fp16")
    with pytest.raises(ConfigError, match="unknown number format 'fp8'"):
        round_to(torch.ones(2), "fp8")

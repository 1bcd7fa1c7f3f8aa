"""Scales and groups are torchao's and DeepSeek-V3's; the expected error is what is measured."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.audit.fp8_rounding import (
    BLOCK,
    SCHEMES,
    SMALLEST_AMAX,
    expected_error,
    operand_error,
    quantised,
    rounding_rms,
)
from floatline.observe.error.rounding import round_to

DTYPES = {"fp8-e4m3": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}
finite = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30)


def torchaos(values, fmt, scaling, dim):
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic  # isort: skip

    row = scaling == "row"
    made = hp_tensor_to_float8_dynamic(
        values,
        DTYPES[fmt],
        LinearMMConfig(),
        scaling_granularity=ScalingGranularity.AXISWISE if row else ScalingGranularity.TENSORWISE,
        axiswise_dim=(0, -1)[dim] if row else None,
        round_scales_to_power_of_2=row,
    )
    return made._data.float() / made._scale


@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("fmt", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_equals_torchao_bit_for_bit(scaling, fmt, dim):
    values = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 24)
    values[3] = 0
    assert torch.equal(quantised(values, fmt, scaling, dim), torchaos(values, fmt, scaling, dim))


@pytest.mark.parametrize(
    ("dim", "square", "shape"), [(1, False, (1, BLOCK)), (0, False, (BLOCK, 1)), (1, True, (BLOCK,) * 2)]
)
@pytest.mark.parametrize("size", [(300, 200), (128, 128), (5, 7)])
def test_blocks_are_scaled_each_by_itself(dim, square, shape, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 4, size[1])
    found = quantised(values, "fp8-e4m3", "block", dim, square=square)
    for top in range(0, size[0], shape[0]):
        for left in range(0, size[1], shape[1]):
            where = (slice(top, top + shape[0]), slice(left, left + shape[1]))
            scale = 448 / values[where].abs().max()
            assert torch.equal(found[where], round_to(values[where] * scale, "fp8-e4m3", saturate=True) / scale)


@pytest.mark.parametrize("fmt", ["fp8-e4m3", "fp8-e5m2", "bf16", "fp16"])
def test_the_derived_error_is_that_of_logarithmic_mantissas(fmt):
    values = torch.exp2(torch.rand(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    error = (round_to(values, fmt) - values).square().mean() / values.square().mean()
    assert error.sqrt().item() == pytest.approx(rounding_rms(fmt), rel=0.01)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_product_of_normal_numbers_costs_what_is_expected(scheme):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 384, generator=generator), torch.randn(384, 192, generator=generator)
    left = quantised(a, scheme.gradients, scheme.name, 1)
    found = left @ quantised(b, scheme.values, scheme.name, 0)
    error = ((found - a @ b).norm() / (a @ b).norm()).item()
    assert error == pytest.approx(expected_error(scheme.gradients, scheme.values), rel=0.15)


@given(finite, st.sampled_from(["tensor", "row", "block"]))
def test_nothing_saturates_and_zeros_stay(values, scaling):
    tensor = torch.tensor([values])
    found = quantised(tensor, "fp8-e4m3", scaling, 1)
    assert found.isfinite().all() and (found[tensor == 0] == 0).all()
    amax = tensor.abs().max().double()
    half_step = torch.maximum(amax * 2**-4, torch.tensor(SMALLEST_AMAX / 448 * 2**-9))  # of normals, of subnormals
    assert (found.abs() <= amax + half_step * (1 + 1e-6)).all()


def test_a_group_smaller_than_the_smallest_scale_is_rounded_to_subnormals():
    tensor = torch.tensor([[1.1778834374254013e-17, 1e-18, 0.0]])
    step = SMALLEST_AMAX / 448 * 2**-9
    assert torch.allclose(quantised(tensor, "fp8-e4m3", "tensor", 1), torch.tensor([[3 * step, 0.0, 0.0]]), atol=0)


def test_what_is_lost_is_counted():
    values = torch.tensor([[448.0, 500.0, 2.0**-11, -(2.0**-11), 0.0, 1.0, 2.0, 4.0]])
    bare = operand_error(values, "fp8-e4m3", "none", 1)
    assert (bare.underflow, bare.saturated) == (2 / 7, 1 / 8)
    exact = operand_error(torch.tensor([[1.0, 2.0, 448.0]]), "fp8-e4m3", "tensor", 1)
    assert exact.sqnr_db == float("inf") and exact.underflow == exact.saturated == 0
    normal = operand_error(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), "fp8-e4m3", "tensor", 1)
    assert normal.sqnr_db == pytest.approx(31.5, abs=0.5)

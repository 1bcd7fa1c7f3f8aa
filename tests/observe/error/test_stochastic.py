"""Stochastic rounding in fp32: a neighbour of the value, in the mean the value, and like observe/error's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from floatline.formats import number_format
from floatline.observe.error import round_to
from floatline.observe.error.stochastic import Dice, StochasticRounding, rounded_at_random

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(exponent=st.integers(-30, 15), seed=st.integers(0, 99))
def test_it_gives_one_of_the_two_neighbours_and_the_value_in_the_mean(name, exponent, seed):
    value = torch.empty(1).uniform_(1, 2, generator=generator(seed)).item() * 2.0**exponent
    got = rounded_at_random(torch.full((20_000,), value), FORMATS[name], Dice(seed)).double()
    fmt = number_format(name)
    step = max(2.0**exponent, fmt.min_normal) * 2.0**-fmt.mantissa_bits
    below = torch.tensor(value, dtype=torch.float64).div(step).floor() * step
    assert set(got.unique().tolist()) <= {float(below), float(below + step)}
    assert abs(float(got.mean()) - value) < 0.025 * step


@pytest.mark.parametrize("name", FORMATS)
def test_exact_values_stay_and_so_do_those_that_are_not_finite(name):
    exact = round_to(torch.randn(1000, generator=generator()), name)
    assert torch.equal(rounded_at_random(exact, FORMATS[name], Dice(0)).float(), exact)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1e30 if name == "fp16" else 1.0])
    got = rounded_at_random(odd, FORMATS[name], Dice(0)).float()
    assert got[0] == torch.inf and got[1] == -torch.inf and got[2].isnan() and got[3] == 0
    assert got[4] == (torch.inf if name == "fp16" else 1)


def test_its_errors_are_those_of_rounding_up_or_down():
    x = torch.randn(50_000, generator=generator())
    slow = round_to(x, "bf16", stochastic=True, generator=generator(1)) - x
    quick = rounded_at_random(x, torch.bfloat16, Dice(2)).float() - x
    assert float(quick.square().mean() / slow.square().mean()) == pytest.approx(1, abs=0.03)


def test_the_mode_rounds_what_ops_give():
    x = torch.full((10_000,), 1 + 2**-9, dtype=torch.float32)
    with StochasticRounding(0):
        low = x.to(torch.bfloat16)
        view = low.reshape(100, 100)
    share = float((low > 1).float().mean())
    assert 0.2 < share < 0.3 and view.data_ptr() == low.data_ptr()
    with StochasticRounding(0):
        assert torch.equal(low, x.to(torch.bfloat16))

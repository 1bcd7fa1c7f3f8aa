import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from floatline.step import magnitudes
from floatline.step.magnitudes import magnitudes_of, nonfinite_counts
from floatline.step.norm import norms_of

from .test_norm import parameters_with


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 100, magnitudes._SMALL + 1, 2 * magnitudes._BLOCK + 3])
def test_they_are_those_of_fp64(dtype: torch.dtype, size: int) -> None:
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    largest, sums = magnitudes_of(norms_of(parameters_with(gradient)))
    assert float(largest) == float(gradient.double().abs().max())
    assert float(sums) == pytest.approx(float(gradient.double().abs().sum()), rel=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32) | st.just(math.inf) | st.just(math.nan), min_size=0, max_size=9),
        min_size=1,
        max_size=5,
    )
)
def test_any_values_are_counted_and_measured(rows: list[list[float]]) -> None:
    named = parameters_with(*[torch.tensor(row, dtype=torch.float32) for row in rows])
    norms = norms_of(named)
    largest, sums = (column.tolist() for column in magnitudes_of(norms))
    counts = nonfinite_counts(norms, {name for name, _ in named})
    for place, row in enumerate(rows):
        nan, inf = sum(map(math.isnan, row)), sum(map(math.isinf, row))
        assert counts[f"p{place}"] == (nan, inf)
        if nan:
            assert math.isnan(largest[place]) and math.isnan(sums[place])
        else:
            assert largest[place] == max(map(abs, row), default=0.0)
            assert sums[place] == pytest.approx(sum(map(abs, row)), rel=1e-5)


def test_views_in_another_order_of_memory() -> None:
    gradient = torch.randn(200, 150)
    named = parameters_with(gradient.t())
    largest, sums = magnitudes_of(norms_of(named))
    assert float(largest) == float(gradient.abs().max())
    assert float(sums) == pytest.approx(float(gradient.abs().sum()), rel=1e-5)


def test_mixed_formats() -> None:
    named = parameters_with(torch.tensor([-3.0]), torch.tensor([2.0], dtype=torch.bfloat16))
    largest, sums = magnitudes_of(norms_of(named))
    assert largest.tolist() == [3.0, 2.0] and sums.tolist() == [3.0, 2.0]


def test_only_the_wanted_are_counted() -> None:
    norms = norms_of(parameters_with(torch.tensor([math.nan]), torch.tensor([math.inf])))
    assert nonfinite_counts(norms, {"p1"}) == {"p1": (0, 1)}
    assert nonfinite_counts(norms, set()) == {}


def test_the_gradients_stay_as_they_are() -> None:
    linear = nn.Linear(300, 300)
    linear(torch.randn(2, 300)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in linear.parameters() if parameter.grad is not None]
    magnitudes_of(norms_of(linear.named_parameters()))
    assert all(torch.equal(a, p.grad) for a, p in zip(before, linear.parameters(), strict=True))

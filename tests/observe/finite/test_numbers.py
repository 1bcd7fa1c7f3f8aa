"""What a tensor's values say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from floatline.observe.finite import bad_rows, has_nan, is_bad, numbers

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
value = st.sampled_from([0.0, 1.0, -3.5, 6e4, -6e4, float("inf"), float("-inf"), float("nan")])
tables = st.lists(st.lists(value, min_size=3, max_size=3), min_size=1, max_size=6)


@given(tables, st.sampled_from(FLOATS))
def test_a_tensor_is_bad_where_one_of_its_values_is(table, dtype):
    tensor = torch.tensor(table).to(dtype)
    assert is_bad(tensor) == (not torch.isfinite(tensor).all())
    assert is_bad(tensor) == bool(bad_rows(tensor))
    assert has_nan(tensor) == torch.isnan(tensor).any()


@given(tables)
def test_bad_rows_are_those_that_hold_a_bad_value(table):
    tensor = torch.tensor(table)
    assert list(bad_rows(tensor)) == [row for row in range(len(tensor)) if not torch.isfinite(tensor[row]).all()]


@given(tables)
def test_counts_add_up(table):
    tensor = torch.tensor(table)
    said = numbers(tensor, "x")
    assert (said.nan, said.positive, said.negative) == (
        int(tensor.isnan().sum()), int(tensor.isposinf().sum()), int(tensor.isneginf().sum())
    )  # fmt: skip
    finite = tensor[tensor.isfinite()]
    assert (said.low, said.high) == ((float(finite.min()), float(finite.max())) if len(finite) else (None, None))
    assert said.bad == tensor.numel() - len(finite)


def test_large_finite_values_are_not_bad_although_their_sum_overflows():
    assert not is_bad(torch.full((4,), 3e38))
    assert not is_bad(torch.full((64,), 6e4, dtype=torch.float16))
    assert not is_bad(torch.full((4,), 3e38, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("tensor", "bad"),
    [
        (torch.tensor([1, 2]), False),
        (torch.tensor([True]), False),
        (torch.empty(0), False),
        (torch.tensor([1 + 1j, complex(float("nan"), 0)]), True),
        (torch.tensor([1 + 1j]).conj(), False),
        (torch.sparse_coo_tensor([[0, 2]], [1.0, float("inf")], (3,)), True),
        (torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2), True),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), False),
        (torch.empty(3, device="meta"), False),
        (torch._efficientzerotensor(3), False),
    ],
)
def test_every_kind_of_tensor_can_be_asked(tensor, bad):
    assert is_bad(tensor) == bad


def test_text_and_headroom():
    tensor = torch.tensor([[1.0, 16376.0], [float("nan"), 0.0]], dtype=torch.float16)
    said = numbers(tensor, "scores")
    assert str(said) == "scores float16[2x2] in [0, 1.638e+04], 1 zeros, 1 NaN at [1, 0]"
    assert said.headroom_bits == pytest.approx(2.0)
    assert said.largest == 16376 and said.zeros == 1 and said.rows == (1,)
    assert str(numbers(torch.tensor(float("inf")), "loss")) == "loss float32[scalar], 1 +inf"
    assert numbers(torch.tensor([1, 2]), "ids").headroom_bits is None

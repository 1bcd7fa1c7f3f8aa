import math

import pytest
import torch
from torch import nn

from floatline.errors import ConfigError
from floatline.step.norm import norms_of, total_norm


def parameters_with(*gradients: torch.Tensor | None) -> list[tuple[str, nn.Parameter]]:
    named = []
    for place, gradient in enumerate(gradients):
        parameter = nn.Parameter(torch.zeros(gradient.shape if gradient is not None else (2,)))
        if gradient is not None:
            parameter.data = parameter.data.to(gradient.dtype)
            parameter.grad = gradient
        named.append((f"p{place}", parameter))
    return named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_each_and_total_in_fp32(dtype: torch.dtype) -> None:
    gradients = [torch.randn(7, 5).to(dtype), torch.randn(300).to(dtype)]
    norms = norms_of(parameters_with(*gradients))
    exact = [gradient.double().norm() for gradient in gradients]
    assert norms.each.dtype == torch.float32
    torch.testing.assert_close(norms.each.double(), torch.stack(exact), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms.total.double(), torch.stack(exact).norm(), rtol=1e-6, atol=0)


def test_fp16_norms_beyond_the_format() -> None:
    norms = norms_of(parameters_with(torch.full((100,), 60_000.0, dtype=torch.float16)))
    assert float(norms.total) == pytest.approx(600_000, rel=1e-3)


def test_total_is_torchs_clip_norm() -> None:
    named = parameters_with(torch.randn(4, 4), torch.randn(9))
    expected = torch.nn.utils.get_total_norm([p.grad for _, p in named])
    assert torch.equal(total_norm([p for _, p in named]), expected)


def test_formats_may_be_mixed() -> None:
    norms = norms_of(parameters_with(torch.ones(4), torch.full((9,), 2.0, dtype=torch.bfloat16)))
    assert norms.each.tolist() == [2.0, 6.0]


def test_names_are_of_those_with_a_gradient() -> None:
    assert norms_of(parameters_with(torch.ones(1), None, torch.ones(2))).names == ("p0", "p2")


def test_culprits() -> None:
    norms = norms_of(parameters_with(torch.ones(2), torch.tensor([1.0, math.nan]), torch.tensor([math.inf])))
    assert norms.culprits() == ["p1", "p2"]
    assert math.isnan(norms.total)


def test_sparse_gradients_count_by_their_values_duplicates_summed() -> None:
    table = nn.Embedding(10, 2, sparse=True)
    table(torch.tensor([3, 3, 5])).sum().backward()
    dense = nn.Embedding(10, 2)
    dense(torch.tensor([3, 3, 5])).sum().backward()
    assert table.weight.grad is not None and table.weight.grad.is_sparse
    assert torch.equal(norms_of(table.named_parameters()).each, norms_of(dense.named_parameters()).each)
    assert norms_of(table.named_parameters()).groups[0].sizes == [20]


def test_sparse_without_values_and_empty_gradients_are_zero() -> None:
    empty = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 2), (10, 2), check_invariants=False
    )
    assert norms_of(parameters_with(empty, torch.zeros(0, 3), torch.ones(4))).each.tolist() == [0.0, 0.0, 2.0]


def test_no_gradient_is_said() -> None:
    with pytest.raises(ConfigError, match="no gradient reached any parameter") as caught:
        norms_of(parameters_with(None, None))
    assert "the parameters that the loss depends on" in caught.value.hint

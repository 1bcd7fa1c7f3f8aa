"""Bytes inside of attention's backward kernels."""

import pytest
import torch

from floatline.hardware import lookup
from floatline.observe.target import attention_scratch

FLASH, EFFICIENT, CUDNN = (f"_scaled_dot_product_{name}_attention_backward" for name in ("flash", "efficient", "cudnn"))


def q(length=256, width=64, heads=4, dtype=torch.float16):
    return torch.empty(2, heads, length, width, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("length", "width", "rows", "wide"),
    [(256, 64, 256, 64), (200, 72, 256, 96), (1, 192, 128, 192), (256, 200, 256, 256)],
)
def test_flash_rounds_its_fp32_gradient_up(length, width, rows, wide):
    query = q(length, width)
    assert attention_scratch(lookup("a100"), FLASH, query, query) == 2 * 4 * rows * (wide + 1) * 4


def test_flash_expands_the_gradients_of_grouped_heads():
    query, key = q(), q(length=300, heads=2)
    alone = attention_scratch(lookup("a100"), FLASH, query, q(length=300))
    assert attention_scratch(lookup("a100"), FLASH, query, key) - alone == 2 * (2 * 4 * 300 * 64) * 2


def test_efficient_has_tiles_and_a_number_a_row():
    query = q(length=130, width=72)
    assert attention_scratch(lookup("t4"), EFFICIENT, query, query) == 8 * (3 * 2 * (64 * 64 * 4 + 16) + 130 * 4)
    wide = q(dtype=torch.float32)
    assert attention_scratch(lookup("p100"), EFFICIENT, wide, wide) == 8 * 256 * 4
    assert attention_scratch(lookup("t4"), EFFICIENT, wide, wide) > wide.nbytes


def test_cudnn_and_all_other_ops():
    query = q()
    assert attention_scratch(lookup("h100"), CUDNN, query, query) == query.numel() * 4
    for op in ("_scaled_dot_product_flash_attention", "bmm"):
        assert attention_scratch(lookup("h100"), op, query, query) == 0

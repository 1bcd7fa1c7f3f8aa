"""fp16 products in fp32: the same up to the order of sums, as wide, and for fp16 alone."""

import pytest
import torch
import torch.nn.functional as F

from floatline.audit.fp16_products import FP16Products
from floatline.observe.error import metering


def half(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


PRODUCTS = {
    "mm": lambda: half(9, 40) @ half(40, 7, seed=1),
    "bmm": lambda: half(2, 9, 40) @ half(2, 40, 7, seed=1),
    "addmm": lambda: F.linear(half(9, 40), half(7, 40, seed=1), half(7, seed=2)),
    "mv": lambda: half(9, 40) @ half(40, seed=1),
    "conv2d": lambda: F.conv2d(half(1, 3, 12, 12), half(4, 3, 5, 5, seed=1), half(4, seed=2), stride=2, padding=1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_the_same_within_one_rounding(name):
    plain = PRODUCTS[name]()
    with FP16Products():
        quick = PRODUCTS[name]()
    assert quick.dtype == torch.float16 and quick.shape == plain.shape
    torch.testing.assert_close(quick, plain, rtol=2**-10, atol=2e-3)


def test_gradients_come_out_in_fp16():
    x, w = half(2, 3, 8, 8).requires_grad_(), half(4, 3, 3, 3, seed=1).requires_grad_()
    F.conv2d(x, w).sum().backward()
    plain = x.grad, w.grad
    x.grad = w.grad = None
    with FP16Products():
        F.conv2d(x, w).sum().backward()
    for quick, slow in zip((x.grad, w.grad), plain):
        assert quick.dtype == torch.float16
        torch.testing.assert_close(quick, slow, rtol=2**-9, atol=1e-2)


def test_what_is_beyond_the_end_is_infinite():
    with FP16Products():
        assert (torch.full((1, 4), 200.0).half() @ torch.full((4, 1), 200.0).half()).isinf().all()


def test_other_formats_are_left_alone():
    x = torch.randn(5, 5, dtype=torch.bfloat16)
    plain = x @ x
    with FP16Products():
        assert torch.equal(x @ x, plain) and (x.float() @ x.float()).dtype == torch.float32


def test_a_meter_above_it_sees_the_op():
    x = half(8, 8)
    with FP16Products(), metering() as meter:
        meter.enter("forward")
        x @ x
    (reading,) = meter.readings
    assert reading.ran == "mm" and reading.measure.format == "fp16" and 0 < reading.measure.error < 1e-3

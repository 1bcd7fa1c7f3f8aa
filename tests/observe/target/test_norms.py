"""RMS norm on fake tensors keeps what CUDA's fused kernel keeps."""

import pytest
import torch
from target_ops import Ops
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from floatline.observe.target import cuda_autocast, target_norms

ROWS, WIDTH = 6, 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_it_keeps_one_fp32_number_a_row(dtype, affine):
    with FakeTensorMode(), target_norms():
        norm = nn.RMSNorm(WIDTH, elementwise_affine=affine, dtype=dtype)
        x = torch.empty(2, ROWS // 2, WIDTH, dtype=dtype, requires_grad=True)
        with Ops() as ops:
            out = norm(x)
            assert ops.bytes == out.numel() * dtype.itemsize + ROWS * 4
            assert (out.shape, out.dtype) == (x.shape, dtype)
            out.sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == dtype
        assert not affine or (norm.weight.grad.shape == (WIDTH,) and norm.weight.grad.dtype == dtype)
    assert "_fused_rms_norm_backward" in ops.names and "pow" not in ops.names


def test_a_frozen_weight_gets_no_gradient():
    with FakeTensorMode(), target_norms():
        norm = nn.RMSNorm(WIDTH).requires_grad_(False)
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        norm(x).sum().backward()
        assert norm.weight.grad is None and x.grad is not None


def test_over_several_dims():
    with FakeTensorMode(), target_norms(), Ops() as ops:
        x = torch.empty(5, 4, 3)
        assert F.rms_norm(x, (4, 3)).shape == x.shape
        assert "pow" not in ops.names


def test_under_autocast_it_computes_in_fp32():
    with FakeTensorMode(), cuda_autocast(), target_norms(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
        assert nn.RMSNorm(WIDTH)(x).dtype == torch.float32


def test_another_format_of_the_weight_and_channels_last_fall_back_to_the_parts():
    with FakeTensorMode(), target_norms():
        for x, weight in (
            (torch.empty(ROWS, WIDTH, dtype=torch.bfloat16), torch.empty(WIDTH)),
            (torch.empty(2, 3, 4, WIDTH).to(memory_format=torch.channels_last), torch.empty(WIDTH)),
        ):
            with Ops() as ops:
                F.rms_norm(x, (WIDTH,), weight)
            assert "pow" in ops.names


def test_torch_refuses_a_wrong_shape_and_real_tensors_compute_as_before():
    x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH)
    before = F.rms_norm(x, (WIDTH,), weight)
    with target_norms():
        assert torch.equal(F.rms_norm(x, (WIDTH,), weight), before)
        with FakeTensorMode(), pytest.raises(RuntimeError, match="normalized_shape"):
            F.rms_norm(torch.empty(ROWS, WIDTH), (WIDTH + 1,))

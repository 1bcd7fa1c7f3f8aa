"""Dropout and softmax of fp16 on fake tensors: the kernels that CUDA runs, and the bytes that their graphs keep."""

import pytest
import torch
from target_ops import Ops
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from floatline.observe.target import cuda_autocast, target_pointwise

N = 1000


def kept(compute, dtype=torch.float16):
    with FakeTensorMode(), target_pointwise():
        x = torch.empty(10, N // 10, dtype=dtype, requires_grad=True)
        with Ops() as ops:
            out = compute(x)
            found = ops.bytes - out.untyped_storage().nbytes()
            out.float().sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == dtype
    return ops.names, found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dropout_keeps_one_byte_an_element(dtype):
    names, found = kept(lambda x: F.dropout(x, 0.1), dtype)
    assert found == N and {"native_dropout", "native_dropout_backward"} <= set(names)


def test_dropout_on_a_cpu_keeps_noise_in_the_inputs_format():
    with FakeTensorMode(), Ops() as ops:
        out = F.dropout(torch.empty(N, requires_grad=True), 0.1)
        assert ops.bytes == 2 * 4 * N + 4 * N  # input, output, noise
        assert out.requires_grad


@pytest.mark.parametrize(("p", "train"), [(0.1, False), (0.0, True), (1.0, True)])
def test_what_does_not_drop_at_random_runs_as_on_a_cpu(p, train):
    with FakeTensorMode(), target_pointwise(), Ops() as ops:
        F.dropout(torch.empty(N), p, train)
    assert "native_dropout" not in ops.names


def test_real_tensors_drop_as_before():
    x = torch.ones(N)
    torch.manual_seed(0)
    before = F.dropout(x, 0.5)
    with target_pointwise():
        torch.manual_seed(0)
        assert torch.equal(F.dropout(x, 0.5), before)


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_softmax_of_fp16_converts_while_it_reads(function):
    names, found = kept(lambda x: function(x, -1, dtype=torch.float32))
    assert "_to_copy" not in names[: names.index(f"_{function.__name__}")] and found == 0


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_softmax_of_bf16_copies_first(function):
    names, _ = kept(lambda x: function(x, -1, dtype=torch.float32), torch.bfloat16)
    assert names.index("_to_copy") < names.index(f"_{function.__name__}")


def losses_ops(loss):
    with FakeTensorMode(), cuda_autocast(), target_pointwise():
        logits = torch.empty(64, N, dtype=torch.float16, requires_grad=True)
        targets = torch.empty(64, dtype=torch.long)
        with Ops() as ops, torch.autocast("cpu", dtype=torch.float16):
            assert loss(logits, targets).dtype == torch.float32
    return ops.names


def test_a_loss_over_log_softmax_of_fp16_makes_no_fp32_copy_of_the_logits():
    names = losses_ops(lambda logits, targets: F.nll_loss(F.log_softmax(logits, -1), targets))
    assert "_to_copy" not in names and "_log_softmax" in names


def test_cross_entropy_names_its_format_so_that_only_its_result_is_cast():
    """It asks log_softmax for the logits' own format, which autocast respects; nll_loss then casts that up."""
    names = losses_ops(F.cross_entropy)
    assert names.index("_log_softmax") < names.index("_to_copy") < names.index("nll_loss_forward")


def test_real_softmax_is_unchanged():
    x = torch.randn(4, 5).half()
    before = x.softmax(-1, dtype=torch.float32)
    with target_pointwise():
        assert torch.equal(x.softmax(-1, dtype=torch.float32), before)

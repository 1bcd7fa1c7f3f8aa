"""SDPA on fake tensors: the kernel that runs, what its graph keeps, and what is left to torch."""

import pytest
import torch
from target_ops import Ops
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from floatline.errors import ConfigError
from floatline.hardware import lookup
from floatline.observe.target import cuda_autocast, target_attention

B, H, L, D = 2, 4, 40, 32
FLASH_STATE, STATE = 24, 16
"""Bytes of random state: a seed and an offset, flash keeps one number more."""
BF16, FP16 = torch.bfloat16, torch.float16


def attend(gpu, *, dim=D, value_dim=None, key_heads=H, mask=None, dtype=BF16, grad=True, backward=True, **options):
    """Run one call with backward on fake tensors; return the ops, and bytes kept between forward and backward."""
    with FakeTensorMode(), target_attention(lookup(gpu)):
        q = torch.empty(B, H, L, dim, dtype=dtype, requires_grad=grad)
        k = torch.empty(B, key_heads, L, dim, dtype=dtype, requires_grad=grad)
        v = torch.empty(B, key_heads, L, value_dim or dim, dtype=dtype, requires_grad=grad)
        mask = None if mask is None else torch.ones(mask[0], dtype=mask[1])
        with Ops() as ops:
            out = F.scaled_dot_product_attention(q, k, v, mask, **options)
            kept = ops.bytes
            assert out.shape == (B, H, L, value_dim or dim) and out.dtype == dtype
            if grad and backward:
                out.sum().backward()
                assert (q.grad.shape, k.grad.shape, v.grad.shape) == (q.shape, k.shape, v.shape)
    return ops.names, kept


def test_flash_keeps_output_and_logsumexp():
    names, kept = attend("a100")
    assert names[0] == "_scaled_dot_product_flash_attention"
    assert "_scaled_dot_product_flash_attention_backward" in names
    assert kept == B * H * L * D * 2 + B * H * L * 4 + FLASH_STATE


def test_efficient_keeps_output_and_a_logsumexp_rounded_up_to_32_rows():
    names, kept = attend("t4", dtype=FP16)
    assert names[0] == "_scaled_dot_product_efficient_attention"
    assert kept == B * H * L * D * 2 + B * H * 64 * 4 + STATE


def test_efficient_keeps_no_logsumexp_without_grad():
    assert attend("t4", dtype=FP16, grad=False)[1] == B * H * L * D * 2
    with torch.no_grad():
        assert attend("t4", dtype=FP16, backward=False)[1] == B * H * L * D * 2


def test_cudnn_keeps_output_and_logsumexp():
    names, kept = attend("h100", mask=((L, L), torch.bool))
    assert names.count("_scaled_dot_product_cudnn_attention") == 1
    assert kept == B * H * L * D * 2 + B * H * L * 4 + L * L * 2 + STATE  # and the mask in bf16


def test_math_keeps_the_matrix_in_fp32():
    names, kept = attend("t4", dtype=BF16)
    assert "bmm" in names and not any("scaled_dot" in name for name in names)
    assert kept >= B * H * L * L * 4


@pytest.mark.parametrize(("dim", "padded"), [(32, 0), (20, 24), (12, 16)])
def test_flash_pads_odd_head_dims_and_keeps_the_padded_copies(dim, padded):
    names, kept = attend("a100", dim=dim, backward=False)
    assert names.count("constant_pad_nd") == (3 if padded else 0)
    width = padded or dim
    assert kept == (4 if padded else 1) * B * H * L * width * 2 + B * H * L * 4 + FLASH_STATE


def test_flash_reads_grouped_heads_and_math_repeats_them():
    assert attend("a100", key_heads=2, enable_gqa=True)[1] == B * H * L * D * 2 + B * H * L * 4 + FLASH_STATE
    names, _ = attend("t4", dtype=FP16, key_heads=2, enable_gqa=True)
    assert "_scaled_dot_product_efficient_attention" not in names and "bmm" in names


@pytest.mark.parametrize(
    ("length", "copied"),
    [(40, False), (41, True), (44, True)],
)
def test_a_mask_that_is_not_aligned_is_copied_into_a_wider_one(length, copied):
    with FakeTensorMode(), target_attention(lookup("a100")):
        q = torch.empty(1, 2, length, 16, dtype=BF16, requires_grad=True)
        mask = torch.empty(1, 1, length, length, dtype=BF16)
        with Ops() as ops:
            out = F.scaled_dot_product_attention(q, q, q, mask)
            mask_bytes = 2 * length * (length + 8 - length % 8 if copied else length)
            assert ops.names.count("constant_pad_nd") == copied
            assert ops.bytes == out.numel() * 2 + 2 * 64 * 4 + STATE + mask_bytes


def test_a_mask_of_bools_becomes_one_of_the_querys_format():
    names, kept = attend("a100", mask=((1, 1, L, L), torch.bool))
    assert "where" in names and "_scaled_dot_product_efficient_attention" in names
    assert kept == B * H * L * D * 2 + B * H * 64 * 4 + L * L * 2 + STATE


def test_a_mask_that_needs_a_gradient_gets_one():
    with FakeTensorMode(), target_attention(lookup("a100")):
        q = torch.empty(1, 2, 16, 16, dtype=BF16, requires_grad=True)
        bias = torch.empty(1, 2, 16, 16, dtype=BF16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, bias).sum().backward()
        assert bias.grad.shape == bias.shape


def test_a_value_of_another_width():
    names, kept = attend("a100", value_dim=16)
    assert names[0] == "_scaled_dot_product_efficient_attention"
    assert kept == B * H * L * 16 * 2 + B * H * 64 * 4 + STATE


def test_dropout_scale_and_causal_reach_the_kernel():
    for gpu, dtype in (("a100", BF16), ("t4", FP16), ("h100", BF16)):
        attend(gpu, dtype=dtype, dropout_p=0.1, is_causal=True, scale=0.5)


def test_switches_hold_inside():
    with sdpa_kernel(SDPBackend.MATH):
        assert "bmm" in attend("a100")[0]


def test_autocast_casts_queries_and_masks_first():
    with FakeTensorMode(), cuda_autocast(), target_attention(lookup("a100")):
        q = torch.empty(1, 2, 16, 16, requires_grad=True)
        with Ops() as ops, torch.autocast("cpu", dtype=BF16):
            out = F.scaled_dot_product_attention(q, q, q, torch.empty(16, 16))
        assert out.dtype == BF16 and "_scaled_dot_product_efficient_attention" in ops.names
        out.float().sum().backward()
        assert q.grad.dtype == torch.float32


def test_multihead_attention_takes_the_kernel():
    with FakeTensorMode(), target_attention(lookup("a100")), Ops() as ops:
        module = nn.MultiheadAttention(32, 4, batch_first=True, dtype=BF16)
        module(*[torch.empty(2, 8, 32, dtype=BF16)] * 3, need_weights=False)[0].sum().backward()
    assert "_scaled_dot_product_flash_attention_backward" in ops.names


def test_inference_mode_makes_the_choice_once_for_equal_calls():
    """There the call reaches a dispatch mode whole; fake tensors decompose it by this body, and remember the result."""
    with FakeTensorMode(), target_attention(lookup("t4")), torch.inference_mode():
        q = torch.empty(1, 2, 18, 24, dtype=FP16)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(ConfigError, match="no attention kernel on t4"):
            F.scaled_dot_product_attention(q, q, q)
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


def test_the_innermost_gpu_counts_and_nothing_is_left_behind():
    q = torch.randn(1, 2, 16, 16)
    with Ops() as before:
        F.scaled_dot_product_attention(q, q, q)
    with target_attention(lookup("a100")):
        assert "_scaled_dot_product_flash_attention" in attend("a100")[0]
        with pytest.raises(ZeroDivisionError), target_attention(lookup("t4")):
            assert "_scaled_dot_product_efficient_attention" in attend("t4", dtype=FP16)[0]
            _ = 1 / 0
        with FakeTensorMode(), Ops() as ops:
            F.scaled_dot_product_attention(*[torch.empty(1, 2, 16, 16, dtype=FP16)] * 3)
        assert "_scaled_dot_product_flash_attention" in ops.names
    with Ops() as after:
        F.scaled_dot_product_attention(q, q, q)
    assert before.names == after.names


def test_real_nested_and_empty_tensors_keep_torchs_own_body():
    q = torch.randn(1, 2, 16, 16)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3)
    nested = torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(2, 3, 8)])
    with target_attention(lookup("a100")):
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.3), expected)
        assert F.scaled_dot_product_attention(nested, nested, nested).is_nested
        with FakeTensorMode():
            empty = torch.empty(1, 2, 0, 16, dtype=BF16)
            assert F.scaled_dot_product_attention(empty, empty, empty).shape == empty.shape


def test_inputs_of_different_formats_are_refused_by_torch():
    with FakeTensorMode(), target_attention(lookup("a100")), pytest.raises(RuntimeError, match="same dtype"):
        F.scaled_dot_product_attention(torch.empty(1, 2, 4, 8), *[torch.empty(1, 2, 4, 8, dtype=BF16)] * 2)

"""The kernel that each GPU chooses, case by case, with the reason why not another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from floatline.errors import ConfigError
from floatline.hardware import CATALOG, lookup
from floatline.observe.target import chosen_kernel
from floatline.observe.target.attention_choice import kernel_order

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def qkv(
    dim=64, *, value_dim=None, heads=8, key_heads=None, length=128, key_length=None, dtype=FP16, grad=False, batch=2
):
    key_heads, key_length = key_heads or heads, key_length or length
    shapes = (
        (batch, heads, length, dim),
        (batch, key_heads, key_length, dim),
        (batch, key_heads, key_length, value_dim or dim),
    )
    return [torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad) for shape in shapes]


def choice(gpu, mask=None, *, dropout=0.0, causal=False, gqa=False, **shapes):
    mask = None if mask is None else torch.empty(mask, device="meta", dtype=torch.bool)
    return chosen_kernel(lookup(gpu), *qkv(**shapes), mask, dropout=dropout, causal=causal, gqa=gqa)


CASES = [
    ("t4", {}, "efficient"),
    ("t4", {"dtype": FP32}, "efficient"),
    ("t4", {"dtype": FP32, "dim": 7}, "efficient"),
    ("t4", {"dim": 12}, "math"),
    ("t4", {"dtype": BF16}, "math"),
    ("t4", {"key_heads": 2, "gqa": True}, "math"),
    ("t4", {"dim": 512}, "efficient"),
    ("p100", {"dim": 12}, "efficient"),
    ("v100", {"mask": (128, 128)}, "efficient"),
    ("a100", {"dtype": BF16}, "flash"),
    ("a100", {"dtype": BF16, "mask": (2, 1, 128, 128)}, "efficient"),
    ("a100", {"dtype": FP32}, "efficient"),
    ("a100", {"dtype": FP32, "dim": 6}, "math"),
    ("a100", {"dtype": torch.float64}, "math"),
    ("a100", {"dim": 12}, "flash"),
    ("a100", {"dim": 256, "grad": True}, "flash"),
    ("a100", {"dim": 512}, "efficient"),
    ("a100", {"dim": 260, "mask": (128, 128)}, "math"),
    ("a100", {"value_dim": 32}, "efficient"),
    ("a100", {"key_heads": 2, "gqa": True}, "flash"),
    ("a100", {"key_heads": 2, "gqa": True, "mask": (128, 128)}, "math"),
    ("a100", {"key_heads": 3, "gqa": True}, "math"),
    ("a100", {"causal": True, "key_length": 256}, "efficient"),
    ("a100", {"causal": True}, "flash"),
    ("rtx-3090", {"dim": 224, "grad": True}, "efficient"),
    ("rtx-3090", {"dim": 224}, "flash"),
    ("rtx-3090", {"dim": 256, "grad": True}, "flash"),
    ("rtx-3090", {"dim": 256, "grad": True, "dropout": 0.1}, "efficient"),
    ("l4", {"dim": 200, "grad": True}, "efficient"),
    ("rtx-5090", {"dim": 200, "grad": True}, "efficient"),
    ("rtx-5090", {"dtype": BF16}, "flash"),
    ("h100", {"dtype": BF16}, "cudnn"),
    ("h100", {"dtype": BF16, "mask": (2, 1, 128, 128)}, "cudnn"),
    ("h100", {"dtype": BF16, "mask": (3, 128, 128)}, "efficient"),
    ("h100", {"dtype": FP32}, "efficient"),
    ("h100", {"dim": 256}, "cudnn"),
    ("h100", {"dim": 12}, "flash"),
    ("h100", {"key_heads": 2, "gqa": True, "mask": (128, 128)}, "cudnn"),
    ("h100", {"length": 1, "key_length": 1}, "flash"),
    ("h100", {"length": 1, "key_length": 64, "dropout": 0.1}, "flash"),
    ("b200", {"dim": 192, "value_dim": 128}, "cudnn"),
    ("b200", {"dim": 192}, "flash"),
]


@pytest.mark.parametrize(("gpu", "call", "kernel"), CASES, ids=[f"{g}-{c}" for g, c, _ in CASES])
def test_each_case(gpu, call, kernel):
    found = choice(gpu, **call)
    assert found.name == kernel
    assert len(found.reasons) == kernel_order(lookup(gpu)).index(kernel)


@pytest.mark.parametrize(
    ("gpu", "call", "reason"),
    [
        ("t4", {}, "flash: t4 has capability 7.5, the kernel needs 8.0 to 12.1"),
        ("a100", {"mask": (128, 128)}, "flash: it takes no mask besides is_causal"),
        ("a100", {"dim": 512}, "flash: head dims must be equal and at most 256, they are (512, 512, 512)"),
        ("a100", {"dtype": FP32}, "flash: it multiplies fp16 and, from capability 8.0, bf16, not torch.float32"),
        ("l4", {"dim": 224, "grad": True}, "flash: it has no backward for head dim 224 with dropout 0 on l4"),
        ("a100", {"causal": True, "key_length": 256}, "flash: is_causal needs equal lengths, not (128, 256)"),
        ("h100", {"dim": 12}, "cudnn: head dims must be multiples of 8 and at most 256, they are (12, 12, 12)"),
        ("h100", {"length": 1, "key_length": 1}, "cudnn: it does not do a length of 1"),
        ("a100", {"key_heads": 3, "gqa": True},
         "flash: 8 query heads cannot be grouped over 3 key heads and 3 value heads"),
        ("h100", {"dtype": BF16, "mask": (3, 128, 128)},
         "cudnn: a mask of shape (3, 128, 128) does not fit (2, 8, 128, 128) as 2 or 4 dims"),
    ],
)  # fmt: skip
def test_each_kernel_passed_over_has_its_reason(gpu, call, reason):
    assert choice(gpu, **call).reasons[0] == reason


def test_reasons_of_the_efficient_kernel():
    reasons = choice("t4", dim=12).reasons
    assert reasons[1] == "efficient: head dims must be multiples of 8 in torch.float16, they are (12, 12, 12)"
    assert "same batch and heads" in choice("t4", key_heads=2, gqa=True).reasons[1]
    assert "need 4 dims" not in str(choice("a100").reasons)


def test_three_dims_empty_and_strided_inputs_go_to_math():
    gpu = lookup("a100")
    three = [torch.empty(8, 16, 64, dtype=FP16, device="meta") for _ in range(3)]
    assert chosen_kernel(gpu, *three)[0] == "math"
    strided = [torch.empty(2, 8, 64, 16, dtype=FP16, device="meta").transpose(2, 3) for _ in range(3)]
    found = chosen_kernel(gpu, *strided)
    assert found.name == "math" and found.reasons[0] == "flash: the last dim of its inputs must be contiguous"
    assert choice("a100", length=0).reasons[0] == "flash: it needs at least one query and one key"


def test_no_grad_lifts_what_only_backward_lacks():
    with torch.no_grad():
        assert choice("rtx-3090", dim=224, grad=True).name == "flash"


@pytest.mark.parametrize(
    ("gpu", "allowed", "kernel"),
    [
        ("a100", [SDPBackend.MATH], "math"),
        ("a100", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], "efficient"),
        ("a100", [SDPBackend.CUDNN_ATTENTION], "cudnn"),
        ("h100", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], "flash"),
        ("h100", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], "cudnn"),
    ],
)
def test_switches_hold(gpu, allowed, kernel):
    with sdpa_kernel(allowed):
        assert choice(gpu).name == kernel
    assert choice("a100").name == "flash"


def test_an_order_that_the_user_sets_holds():
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert choice("h100").name == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert choice("a100").name == "efficient"
    assert kernel_order(lookup("a100")) == ("flash", "efficient", "math", "cudnn")


def test_cudnn_can_be_put_last_as_in_torch(monkeypatch):
    assert kernel_order(lookup("h100"))[0] == "cudnn"
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert kernel_order(lookup("h100"))[0] == "flash"


def test_deterministic_runs_do_without_cudnn():
    torch.use_deterministic_algorithms(True)
    try:
        assert choice("h100").name == "flash"
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert choice("h100").name == "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_left_is_an_error_with_all_reasons():
    with (
        sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
        pytest.raises(
            ConfigError, match=r"no attention kernel on t4 .*flash: t4 has capability 7.5.*\nhint: allow the math"
        ),
    ):
        choice("t4")


@given(
    gpu=st.sampled_from(sorted(CATALOG)),
    dim=st.integers(1, 300),
    dtype=st.sampled_from([FP16, BF16, FP32]),
    mask=st.booleans(),
    grad=st.booleans(),
    causal=st.booleans(),
)
def test_what_holds_for_every_call(gpu, dim, dtype, mask, grad, causal):
    call = {"dim": dim, "dtype": dtype, "grad": grad, "length": 16, "causal": causal}
    found = choice(gpu, mask=(16, 16) if mask else None, **call)
    capability = lookup(gpu).capability
    assert found.name != "flash" or (capability >= (8, 0) and not mask and dim <= 256 and dtype != FP32)
    assert found.name != "cudnn" or (capability >= (9, 0) and dim % 8 == 0 and dtype != FP32)
    assert found.name != "efficient" or dtype == FP32 or capability < (7, 0) or dim % 8 == 0
    assert found.name == "math" or dtype != BF16 or capability >= (8, 0)
    assert all(reason.split(":")[0] in ("cudnn", "flash", "efficient", "math") for reason in found.reasons)

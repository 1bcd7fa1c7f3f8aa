"""What runs where, by compute capability."""

import pytest

from floatline.errors import ConfigError
from floatline.hardware import CATALOG, Hardware, attention_verdict, detect, format_verdict, lookup, resolve
from floatline.hardware.detect import _cpu_formats


@pytest.mark.parametrize(
    ("gpu", "legal"),
    [
        ("p100", {"fp32", "fp16"}),
        ("v100", {"fp32", "fp16"}),
        ("t4", {"fp32", "fp16"}),
        ("a100", {"fp32", "tf32", "fp16", "bf16"}),
        ("rtx-3090", {"fp32", "tf32", "fp16", "bf16"}),
        ("l4", {"fp32", "tf32", "fp16", "bf16", "fp8"}),
        ("h200", {"fp32", "tf32", "fp16", "bf16", "fp8"}),
    ],
)
def test_formats_by_capability(gpu, legal):
    hardware = lookup(gpu)
    assert {f for f in ("fp32", "tf32", "fp16", "bf16", "fp8") if format_verdict(hardware, f)} == legal


def test_consumer_pascal_has_no_useful_fp16():
    assert not format_verdict(Hardware(name="gtx-1080", capability=(6, 1)), "fp16")


def test_reason_names_capability_and_threshold():
    assert format_verdict(lookup("t4"), "bf16").reason == "t4 is Turing, capability 7.5; bf16 units start at 8.0"


@pytest.mark.parametrize(
    ("gpu", "kernel", "ok"),
    [
        ("t4", "flash", False),
        ("t4", "efficient", True),
        ("a100", "flash", True),
        ("a100", "flash-attn-3", False),
        ("h100", "flash-attn-3", True),
    ],
)
def test_attention_kernels(gpu, kernel, ok):
    assert bool(attention_verdict(lookup(gpu), kernel)) is ok


@pytest.mark.parametrize(
    ("flags", "formats"),
    [
        ({"avx512f"}, set()),
        ({"avx512_bf16"}, {"bf16"}),
        ({"amx_bf16", "amx_fp16"}, {"bf16", "fp16"}),
        ({"asimdhp"}, {"fp16"}),
    ],
)
def test_cpu_flags(flags, formats):
    assert _cpu_formats(frozenset(flags)) == formats


def test_names_and_aliases():
    assert lookup("H100") is CATALOG["h100-80gb"]
    assert lookup("A100_40GB") is CATALOG["a100-40gb"]
    with pytest.raises(ConfigError, match=r"unknown hardware 't5'"):
        lookup("t5")
    with pytest.raises(ConfigError, match="did you mean 'h200'"):
        lookup("h20")


def test_unknown_kernel_and_format_are_errors():
    with pytest.raises(ConfigError, match="flash"):
        attention_verdict(lookup("t4"), "flsh")
    with pytest.raises(ConfigError, match="no rule"):
        format_verdict(lookup("t4"), "fp4")


def test_auto_is_this_machine():
    assert resolve("auto") == detect()
    assert resolve("cpu").kind == "cpu"
    assert resolve("cpu").memory > 0
    assert resolve(lookup("t4")).name == "t4"


def test_catalog_is_plausible():
    for gpu in CATALOG.values():
        assert 10 * 2**30 < gpu.memory < 200 * 2**30
        assert gpu.bandwidth > 1e11
        assert "bf16" in gpu.tflops or gpu.capability < (8, 0)


def test_hardware_is_a_name_or_facts():
    with pytest.raises(ConfigError, match="hardware is 16"):
        resolve(16)

"""The allocator's settings: what torch's environment variable may say, and what sizes become of it."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError
from floatline.plan.allocator_settings import MIB, AllocatorSettings

POWERS = st.sampled_from([0, 1, 2, 4, 8, 16])
SETTINGS = st.builds(
    AllocatorSettings,
    expandable_segments=st.booleans(),
    large_segment_size_mb=st.integers(11, 40),
    max_split_size_mb=st.none() | st.integers(40, 10**6),
    max_non_split_rounding_mb=st.none() | st.integers(40, 10**6),
    per_process_memory_fraction=st.floats(0, 1, exclude_min=True),
    garbage_collection_threshold=st.floats(0, 1, exclude_max=True),
    roundup_power2_divisions=POWERS | st.tuples(*[POWERS] * 16),
)


@given(SETTINGS)
def test_the_text_parses_back(settings):
    assert AllocatorSettings.parse(str(settings)) == settings


def test_the_defaults_are_torchs_and_have_no_text():
    assert str(AllocatorSettings()) == ""
    assert AllocatorSettings.parse("") == AllocatorSettings()


def test_spaces_trailing_commas_and_repeated_keys_are_read_as_torch_reads_them():
    parsed = AllocatorSettings.parse(" max_split_size_mb : 30 , max_split_size_mb:40,")
    assert parsed == AllocatorSettings(max_split_size_mb=40)


def test_settings_of_host_memory_are_left_out():
    text = "backend:native,pinned_use_background_threads:True,pinned_num_register_threads:8,expandable_segments:True"
    assert AllocatorSettings.parse(text) == AllocatorSettings(expandable_segments=True)


def test_round_up_steps_can_differ_by_size():
    """Sizes below the first bound are treated like it, those above the last by ">"."""
    parsed = AllocatorSettings.parse("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")
    assert parsed.roundup_power2_divisions == (1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 8, 8, 8, 8, 8)
    assert parsed.round_size(300 * MIB) == 300 * MIB
    assert parsed.round_size(513 * MIB) == 768 * MIB
    assert parsed.round_size(1025 * MIB) == 1280 * MIB
    assert parsed.round_size(2049 * MIB) == 2304 * MIB
    assert parsed.round_size(2**40 + 1) == 2**40 + 2**37


def test_sizes_too_small_for_the_steps_are_rounded_to_512():
    settings = AllocatorSettings(roundup_power2_divisions=8)
    assert [settings.round_size(n) for n in (1, 4095, 4096, 4097, 9000)] == [512, 4096, 4096, 4608, 9216]


@given(st.integers(1, 2**40), POWERS)
def test_rounding_is_up_by_less_than_a_step(size, steps):
    rounded = AllocatorSettings(roundup_power2_divisions=steps).round_size(size)
    assert rounded % 512 == 0
    assert 0 <= rounded - size < (512 if steps < 2 else max(512, size / steps))


BAD = [
    ("expandable_segment:True", r"unknown allocator setting 'expandable_segment'\nhint: did you mean 'expandable_seg"),
    ("wings:2", r"unknown allocator setting 'wings'\nhint: allowed: expandable_segments, "),
    ("expandable_segments:true", r"expandable_segments = 'true'; allowed: True or False"),
    ("max_split_size_mb:19", r"max_split_size_mb = 19; allowed: 20 \(large_segment_size_mb\) or more"),
    ("large_segment_size_mb:30,max_split_size_mb:29", r"max_split_size_mb = 29; allowed: 30"),
    ("max_split_size_mb:large", r"max_split_size_mb = 'large'; allowed: a whole number"),
    ("max_split_size_mb", r"allocator setting 'max_split_size_mb' in .*\nhint: write key:value"),
    ("max_non_split_rounding_mb:5", r"max_non_split_rounding_mb = 5; allowed: 20"),
    ("large_segment_size_mb:10", r"large_segment_size_mb = 10; allowed: above 10"),
    ("garbage_collection_threshold:1.0", r"garbage_collection_threshold = 1.0; allowed: above 0 and below 1"),
    ("garbage_collection_threshold:0", r"garbage_collection_threshold = '0'; allowed: a number above 0"),
    ("garbage_collection_threshold:half", r"garbage_collection_threshold = 'half'; allowed: a number above 0"),
    ("per_process_memory_fraction:1.5", r"per_process_memory_fraction = '1.5'; allowed: a number above 0, up to 1"),
    ("roundup_power2_divisions:3", r"roundup_power2_divisions = 3; allowed: a power of two"),
    ("roundup_power2_divisions:0", r"roundup_power2_divisions = '0'; allowed: a power of two"),
    ("roundup_power2_divisions:[3:8]", r"roundup_power2_divisions = '\[3:8\]'; allowed: bounds that are powers of two"),
    ("roundup_power2_divisions:[4:8", r"a bracket does not close"),
    ("roundup_power2_divisions:[4]", r"roundup_power2_divisions = ''; allowed: a whole number"),
    ("backend:cudaMallocAsync", r"backend:cudaMallocAsync is not simulated\nhint: plan with backend:native"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_torch_would_refuse_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        AllocatorSettings.parse(text)


@pytest.mark.parametrize("steps", [3, -2, (1, 2), (3,) * 16])
def test_steps_must_be_powers_of_two(steps):
    with pytest.raises(
        ConfigError, match=r"roundup_power2_divisions = .*; allowed: a power of two or 0, or 16 of them"
    ):
        AllocatorSettings(roundup_power2_divisions=steps)


def test_torchs_own_parser_agrees():
    """In a process of its own, for it would change the allocator of this one.

    The CPU build knows neither CUDA's keys nor that others are unknown, so only values are compared. torch keeps
    a large_segment_size_mb that was once set, so it is set back before each text.
    """
    known = ("expandable_segments", "max_split", "max_non_split", "garbage_collection", "roundup_power2", "large_seg")
    texts = [text for text, _ in BAD if text.startswith(known)]
    good = ["expandable_segments:False", "max_split_size_mb:20", "large_segment_size_mb:11", "", " ",
            "garbage_collection_threshold:0.99", "roundup_power2_divisions:8", "roundup_power2_divisions:[4:0,>:8]",
            "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]", "large_segment_size_mb:30,max_split_size_mb:30",
            "max_non_split_rounding_mb:20,expandable_segments:True,"]  # fmt: skip
    good += [str(AllocatorSettings(roundup_power2_divisions=tuple([0, 2, 4, 8] * 4), max_split_size_mb=64))]
    code = (
        "import json, sys, torch\nanswers = []\n"
        "for text in json.load(sys.stdin):\n"
        "    torch._C._accelerator_setAllocatorSettings('large_segment_size_mb:20')\n"
        "    try:\n        torch._C._accelerator_setAllocatorSettings(text); answers.append(True)\n"
        "    except (ValueError, RuntimeError): answers.append(False)\n"
        "print(json.dumps(answers))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts + good), capture_output=True, text=True)
    if "_accelerator_setAllocatorSettings" in done.stderr:
        pytest.skip("this torch does not show its parser")
    assert json.loads(done.stdout) == [False] * len(texts) + [True] * len(good)
    for text in good:
        AllocatorSettings.parse(text)

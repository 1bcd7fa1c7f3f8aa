"""GPUs that are not listed: sizes and capabilities as people write them, and what is said when they cannot be read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError
from floatline.hardware import lookup, target
from floatline.hardware.described import parse_capability, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("24000MiB", 24000 * 2**20), ("0.5tib", 2**39), (" 1 kb ", 1000)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@given(st.integers(1, 10**6), st.sampled_from(["KiB", "MiB", "GiB", "TiB", "KB", "MB", "GB", "TB"]))
def test_any_whole_amount_is_read_exactly(amount, unit):
    base = 1024 if "i" in unit else 1000
    assert parse_size(f"{amount}{unit}") == amount * base ** ("KMGT".index(unit[0]) + 1)


@pytest.mark.parametrize("text", ["24", "GiB", "24 gibibytes", "-1GiB", "0GiB", "", "24G iB", "1e3GiB", "24G"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="is not an amount of memory") as raised:
        parse_size(text, "--vram")
    assert raised.value.message.startswith(f"--vram {text!r}") and "write 24GiB" in raised.value.hint


@pytest.mark.parametrize("text", ["8", "8,6", "86", "sm_86", "4.0", "13.0", "8.66", ""])
def test_what_is_no_capability(text):
    with pytest.raises(ConfigError, match=r"from 5.0 to 12.9") as raised:
        parse_capability(text)
    assert "compute_cap" in raised.value.hint


def test_a_card_from_two_facts_takes_the_rest_from_its_nearest_twin():
    made = target("rtx-3080", vram="10GiB", capability="8.6")
    twin = lookup("a10g")  # of the two cards of 8.6 the one nearer in memory
    assert (made.name, made.memory, made.capability) == ("rtx-3080", 10 * 2**30, (8, 6))
    assert (made.tflops, made.bandwidth, made.context) == (twin.tflops, twin.bandwidth, twin.context)
    assert made.note == "10.0 GiB and capability 8.6 as given; rates, bandwidth and context of a10g"
    assert made.generation == "Ampere"


def test_a_card_without_a_name_is_called_by_its_facts():
    assert target(vram="48GiB", capability="8.7").name == "a GPU of capability 8.7 with 48.0 GiB"
    assert target(vram="48GiB", capability="8.7").note.endswith("of rtx-3090")  # 8.6 is nearest, then memory


def test_a_known_card_with_other_memory():
    half = target("t4", vram="7.5GiB")
    assert half.memory == int(7.5 * 2**30) and half.capability == (7, 5) and half.name == "t4 with 7.5 GiB"
    assert target("T4", vram="7.5GiB", capability="7.5").note.endswith("context of t4")


def test_names_go_through():
    assert target("t4") is lookup("t4") and target("cpu").kind == "cpu"


@pytest.mark.parametrize(
    ("name", "facts", "message", "hint"),
    [
        (
            "rtx-3080",
            {},
            "unknown hardware 'rtx-3080'",
            "did you mean 'rtx-3090' or 'rtx-5090' or 'rtx-4090'? Or give --vram 24GiB --capability 8.6",
        ),
        ("gpu9000", {}, "unknown hardware 'gpu9000'", "b200; or give --vram 24GiB --capability 8.6"),
        ("gpu9000", {"vram": "24GiB"}, "unknown hardware 'gpu9000'", "--capability 8.6"),
        ("x", {"capability": "8.6"}, "--capability 8.6 was given without --vram", "give --vram"),
        ("t4", {"vram": "24GiB", "capability": "8.6"}, "t4 has capability 7.5, not 8.6", "leave --capability out"),
        ("x", {"vram": "24", "capability": "8.6"}, "--vram '24' is not an amount of memory", "GiB"),
    ],
)
def test_mistakes(name, facts, message, hint):
    with pytest.raises(ConfigError) as raised:
        target(name, **facts)
    assert message in raised.value.message and hint in raised.value.hint

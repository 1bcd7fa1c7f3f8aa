"""Policies parse from and print to one string; rules match whole path components."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from floatline.errors import PrecisionError
from floatline.hardware import CATALOG, Hardware, lookup
from floatline.precision import BASES, Policy, Rule, choose, resolve
from floatline.precision.rules import match_rules
from floatline.select import matches, near_names, select_modules

component = st.one_of(st.just("*"), st.just("**"), st.text("abcxyz_0123", min_size=1, max_size=6))
patterns = st.lists(component, min_size=1, max_size=5).map(".".join)
rules = st.dictionaries(patterns, st.sampled_from(["32", "16", "bf16"]), max_size=4)


@given(st.sampled_from(list(BASES)), rules)
def test_a_policy_prints_the_string_that_parses_it(name, formats):
    scaled = BASES[name].loss_scaling
    policy = Policy(name, tuple(Rule(pattern, fmt) for pattern, fmt in formats.items() if scaled or fmt != "16"))
    assert Policy.parse(str(policy)) == policy


@given(st.text(max_size=40))
def test_any_text_parses_or_is_a_precision_error(text):
    try:
        policy = Policy.parse(text)
    except PrecisionError:
        return
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16-mixd", "unknown precision 'bf16-mixd'\nhint: did you mean 'bf16-mixed'"),
        ("bf16", "unknown precision 'bf16'"),
        ("auto", "unknown precision 'auto'"),
        ("16-mixed; lm_head", "has no `=`"),
        ("16-mixed; lm_head=64", "unknown format '64'.*\nhint: allowed: 32, bf16, 16"),
        ("16-mixed; a..b=32", "bad module pattern 'a..b'"),
        ("32-true; a=16", "fp16 gradients need loss scaling, which 32-true has not\nhint: write a=bf16"),
        ("16-mixed; a=32; a=bf16", "contradict each other: a=32 and a=bf16"),
    ],
)
def test_errors(text, message):
    with pytest.raises(PrecisionError, match=message):
        Policy.parse(text)


def test_not_a_string():
    with pytest.raises(PrecisionError, match="must be a string, not 16"):
        Policy.parse(16)


@pytest.mark.parametrize(
    ("pattern", "name", "matched"),
    [
        ("wo", "word_embedding", False),
        ("**.wo", "block.wo", True),
        ("**.wo", "block.word", False),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.b.b.c", False),
        ("a.**.c", "a.b.b.c", True),
        ("a.**", "a", True),
        ("blocks.*.fc*", "blocks.0.fc1", True),
    ],
)
def test_patterns(pattern, name, matched):
    assert matches(pattern, name) is matched


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"mlp": nn.Linear(2, 2), "attn": nn.Linear(2, 2)}) for _ in range(2)]
        )
        self.word_embedding = nn.Embedding(3, 2)


def test_rules_select_modules():
    assert list(select_modules(Net(), "blocks.*.mlp")) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert match_rules(Net(), Policy.parse("16-mixed; blocks.*.mlp=32; blocks.0.attn=16")) == {
        "blocks.0.mlp": "32",
        "blocks.1.mlp": "32",
        "blocks.0.attn": "16",
    }


def test_a_rule_that_matches_nothing_names_near_modules():
    with pytest.raises(
        PrecisionError, match=r"block\.\*\.mlp=32 matches no module of Net\nhint: near names: .*blocks.0.mlp"
    ):
        match_rules(Net(), Policy.parse("bf16-mixed; block.*.mlp=32"))
    assert near_names(Net(), "zzz") == []


def test_contradicting_rules_are_an_error_on_the_module():
    with pytest.raises(PrecisionError, match=r"blocks.0.mlp: blocks\.\*\.mlp=32 and blocks.0.\*=16"):
        match_rules(Net(), Policy.parse("16-mixed; blocks.*.mlp=32; blocks.0.*=16"))


def test_a_rule_for_a_mere_container_is_refused():
    with pytest.raises(
        PrecisionError, match=r"blocks, a ModuleList that is never called itself\nhint: .*blocks\.\*=32"
    ):
        match_rules(Net(), Policy.parse("bf16-mixed; blocks=32"))


CPU_BF16 = Hardware(name="new cpu", kind="cpu", cpu_formats=frozenset({"bf16"}))
CPU_OLD = Hardware(name="old cpu", kind="cpu")


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        *[(gpu, "16-mixed" if gpu.capability < (8, 0) else "bf16-mixed") for gpu in CATALOG.values()],
        (Hardware(name="gtx-1080", capability=(6, 1)), "32-true"),
        (CPU_BF16, "bf16-mixed"),
        (CPU_OLD, "32-true"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_auto_by_hardware(hardware, expected):
    choice = choose(hardware)
    assert str(choice.policy) == expected
    assert hardware.name in choice.reason


@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true", "fp8-mixed", "16-mixed; lm_head=bf16"])
def test_illegal_on_a_t4_names_the_next_best(name):
    with pytest.raises(PrecisionError, match=r"Turing, capability 7.5(.|\n)*use precision=16-mixed"):
        resolve(name, lookup("t4"))


def test_legal_ones_pass_and_auto_keeps_rules():
    assert str(resolve("16-mixed", lookup("t4")).policy) == "16-mixed"
    assert str(resolve("auto; lm_head=32", lookup("t4")).policy) == "16-mixed; lm_head=32"
    assert "emulated" in resolve("16-mixed", CPU_OLD).reason


def test_fp8_says_where_it_is_emulated():
    assert resolve("fp8-mixed", lookup("h200")).reason == "asked for"
    assert resolve("fp8-rowwise-mixed", lookup("l4")).reason == "asked for"
    assert "Ampere, capability 8.0; fp8 units start at 8.9, so fp8 products are emulated" in (
        resolve("fp8-mixed", lookup("a100-80gb")).reason
    )
    assert "torchao has no fp8 products for CPUs (new cpu), so" in resolve("fp8-mixed", CPU_BF16).reason
    assert "no bf16 instructions" in resolve("fp8-mixed", CPU_OLD).reason


def test_auto_never_chooses_fp8():
    assert {choose(gpu).policy.base.compute for gpu in CATALOG.values()} == {"bf16", "fp16"}


@pytest.mark.parametrize(
    "text", ["fp8-mixed; lm_head=fp8; a.*=32; b=bf16", "fp8-rowwise-mixed", "fp8-rowwise-gw-hp-mixed"]
)
def test_fp8_policies_print_as_what_parses_them(text):
    assert str(Policy.parse(text)) == text


def test_fp8_rules_need_an_fp8_policy():
    with pytest.raises(
        PrecisionError, match=r"rule a=fp8 under bf16-mixed: fp8 layers need an fp8 policy\nhint: .*fp8-mixed"
    ):
        Policy.parse("bf16-mixed; a=fp8")
    with pytest.raises(PrecisionError, match=r"rule a=16 under fp8-mixed: fp16 gradients need loss scaling"):
        Policy.parse("fp8-mixed; a=16")

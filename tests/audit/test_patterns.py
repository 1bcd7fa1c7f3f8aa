"""A set of modules becomes few patterns that select exactly this set."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from floatline.audit import patterns
from floatline.audit.patterns import shortest_patterns
from floatline.errors import ConfigError
from floatline.precision import Policy
from floatline.select import matches, select_modules


def model_of(*paths):
    """A model that has the modules of these dotted names, and those around them."""
    model = nn.Module()
    for path in paths:
        home = model
        for part in path.split("."):
            if part not in home._modules:
                home.add_module(part, nn.Module())
            home = home._modules[part]
    return model


def names_of(model):
    return [name for name, _ in model.named_modules()]


LAYERS = names_of(
    model_of(
        "embed",
        "norm",
        "lm_head",
        *(f"layers.{i}.{part}" for i in range(12) for part in ("norm1", "norm2", "attn.q_proj", "attn.k_proj", "fc")),
    )
)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([], []),
        (["norm"], ["norm"]),
        (["layers.3.fc"], ["layers.3.fc"]),
        ([f"layers.{i}.fc" for i in range(12)], ["layers.*.fc"]),
        ([f"layers.{i}" for i in range(12)], ["layers.*"]),
        ([f"layers.{i}.norm{j}" for i in range(12) for j in (1, 2)], ["layers.*.norm*"]),
        ([f"layers.{i}.attn.{j}_proj" for i in range(12) for j in "qk"], ["layers.*.attn.*"]),
        ([f"layers.{i}.fc" for i in range(4)], ["layers.[0-3].fc"]),
        ([f"layers.{i}.fc" for i in (0, 11)], ["layers.0.fc", "layers.11.fc"]),
        ([f"layers.{i}.fc" for i in (8, 9, 10, 11)], ["layers.1[0-1].fc", "layers.[8-9].fc"]),
        ([f"layers.{i}.norm1" for i in range(12)] + ["norm"], ["layers.*.norm1", "norm"]),
        ([f"layers.{i}.norm{j}" for i in range(12) for j in (1, 2)] + ["norm"], ["**.norm*"]),
        ([name for name in LAYERS if name], ["**"]),
        ([f"layers.{i}.fc" for i in range(12) if i != 5], ["layers.1[0-1].fc", "layers.[0-4].fc", "layers.[6-9].fc"]),
    ],
)
def test_the_patterns_a_reader_expects(chosen, expected):
    found = shortest_patterns(chosen, LAYERS)
    selected = {name for name in LAYERS if name and any(matches(pattern, name) for pattern in found)}
    assert selected == set(chosen)
    assert list(found) == expected


def test_norms_of_different_depth_have_one_pattern():
    names = names_of(model_of("norm", "a.0.norm", "a.1.norm", "b.c.norm", "b.norm_out"))
    assert shortest_patterns([name for name in names if name.endswith(".norm")] + ["norm"], names) == ("**.norm",)


def test_what_another_module_forbids_is_not_used():
    names = names_of(model_of(*(f"l.{i}.norm" for i in range(3)), "m.0.norm"))
    assert shortest_patterns(["l.0.norm", "l.1.norm", "l.2.norm"], names) == ("l.*.norm",)
    assert shortest_patterns(["l.0.norm", "l.2.norm"], names) == ("l.0.norm", "l.2.norm")
    assert shortest_patterns(["l.0.norm", "m.0.norm"], names) == ("*.0.norm",)


def test_plain_patterns_are_preferred():
    names = names_of(model_of("layers.0.fc", "head.5.fc", "other.2.fc"))
    assert shortest_patterns(["layers.0.fc", "head.5.fc"], names) == ("head.5.fc", "layers.0.fc")
    names = names_of(model_of("x", "a.0.x", "a.0.y", "a.1.x", "a.1.y"))
    assert shortest_patterns(["x", "a.0.x", "a.1.x", "a.1.y"], names) == ("**.x", "a.1.y")


part = st.one_of(
    st.sampled_from(["a", "b", "0", "1", "2", "10", "11", "norm", "norm1", "norm2", "q_proj", "k_proj", "fc_1"]),
    st.text("a1_*?[]-=;! ", min_size=1, max_size=3),
)
plain_part = st.sampled_from(["a", "b", "0", "1", "2", "10", "norm1", "norm2", "q_proj", "k_proj"])


def paths_of(parts):
    return st.lists(st.lists(parts, min_size=1, max_size=4).map(".".join), min_size=1, max_size=10)


@settings(max_examples=300, deadline=None)
@given(paths_of(part), st.data())
def test_patterns_select_exactly_the_set(paths, data):
    model = model_of(*paths)
    names = [name for name in names_of(model) if name]
    chosen = data.draw(st.sets(st.sampled_from(names)))
    try:
        found = shortest_patterns(chosen, names)
    except ConfigError as error:
        assert "alone" in error.message and any(set("=; ") & set(name) for name in chosen)
        return
    assert {name for pattern in found for name in select_modules(model, pattern)} == chosen
    assert len(found) <= len(chosen)
    policy = Policy.parse("; ".join(["bf16-mixed", *(f"{pattern}=32" for pattern in found)]))
    assert tuple(rule.pattern for rule in policy.rules) == found


@settings(max_examples=100, deadline=None)
@given(paths_of(plain_part), st.data())
def test_no_fewer_of_the_patterns_would_do(paths, data):
    names = [name for name in names_of(model_of(*paths)) if name]
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
    found = shortest_patterns(chosen, names)
    assert found == shortest_patterns(sorted(chosen, reverse=True), [*reversed(names), ""])
    index = patterns._Index(sorted(names))
    allowed = index.bits(chosen)
    sets = {bits for _, bits in patterns._candidates(sorted(chosen), index) if not bits & ~allowed}
    unions = {0}
    for _ in range(len(found) - 1):
        unions = {union | bits for union in unions for bits in sets}
    assert allowed not in unions


@settings(max_examples=100, deadline=None)
@given(paths_of(part))
def test_candidates_match_what_select_says(paths):
    names = sorted(name for name in names_of(model_of(*paths)) if name)
    index = patterns._Index(names)
    for pattern, bits in patterns._candidates(names, index):
        assert bits == index.bits(name for name in names if matches(pattern, name)), pattern


def test_where_the_fewest_take_too_long_the_cover_is_greedy(monkeypatch):
    chosen = [name for place, name in enumerate(LAYERS) if name and place % 3]
    monkeypatch.setattr(patterns, "MOST_NODES", 0)
    found = shortest_patterns(chosen, LAYERS)
    assert {name for name in LAYERS if name and any(matches(pattern, name) for pattern in found)} == set(chosen)
    assert len(found) < len(chosen)


def test_a_module_that_the_model_has_not():
    with pytest.raises(ConfigError, match=r"the model has no module 'layer\.3\.fc'\nhint: did you mean"):
        shortest_patterns(["layer.3.fc"], LAYERS)


def test_a_name_that_no_pattern_tells_from_another():
    with pytest.raises(ConfigError, match="no pattern matches the module 'a=b' alone\nhint: rename it"):
        shortest_patterns(["a=b"], ["a=b", "a;b"])
    assert shortest_patterns(["a=b"], ["a=b", "ab"]) == ("a?b",)
    assert shortest_patterns(["a*b"], ["a*b", "axb"]) == ("a[*]b",)

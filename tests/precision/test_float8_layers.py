"""Which linear layers stay high, and what a user reads about it."""

import pytest
import torch
from torch import nn

from floatline.errors import PrecisionError
from floatline.precision import Policy
from floatline.precision.float8_layers import choose_linears, odd_dims, too_small
from floatline.precision.rules import match_rules

BIG, WIDE = 4112, 1040  # BIG inputs, or WIDE outputs, make a layer large enough for fp8 with one scale a tensor


def big(inputs=BIG, outputs=WIDE):
    return nn.Linear(inputs, outputs, device="meta")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.choose = big(BIG, 16)
        self.gate_proj = big()
        self.experts = nn.ModuleList(big() for _ in range(16))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WIDE, BIG, device="meta")
        self.first = big()
        self.gate = big()
        self.router = nn.ModuleDict({"inner": big()})
        self.moe = Experts()
        self.small = big(4096, 1024)
        self.odd = big(BIG + 1, WIDE + 4)
        self.attend = nn.MultiheadAttention(64, 2, device="meta")
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(BIG, WIDE))
        self.middle = big()
        self.tied = big()
        self.tied.weight = self.embed.weight
        self.head = big()
        self.last = big()

    def get_output_embeddings(self):
        return self.head


def choice_of(policy, model=None):
    model, policy = model or Model(), Policy.parse(policy)
    return choose_linears(model, policy, match_rules(model, policy))


KEPT = {
    "first": "first linear: its errors reach everything after it",
    "gate": "router: rounding changes which experts are chosen",
    "router.inner": "router: rounding changes which experts are chosen",
    "moe.choose": "router: rounding changes which experts are chosen",
    "small": "small layer: 4096 to 1024, where torchao measured no gain with tensorwise scales on H100",
    "odd": "odd dims: 4113 inputs and 1044 outputs, fp8 products need multiples of 16",
    "attend.out_proj": "not convertible: nn.MultiheadAttention reads its weight without calling it",
    "normed": "not convertible: a ParametrizedLinear, which may compute otherwise than nn.Linear",
    "tied": "tied: it shares its weight with the embedding embed",
    "head": "output head: its errors go straight into the loss",
    "last": "last linear: its errors go straight into the loss",
}


def test_every_reason_is_found_and_the_rest_is_chosen():
    choice = choice_of("fp8-mixed")
    assert choice.kept == KEPT
    assert set(choice.chosen) == {"middle", "moe.gate_proj", *(f"moe.experts.{n}" for n in range(16))}
    assert str(choice) == (
        "18 of 29 linear layers compute in fp8; kept high: 1 first linear, 3 router, 1 small layer, 1 odd dims, "
        "2 not convertible, 1 tied, 1 output head, 1 last linear"
    )


@pytest.mark.parametrize("name", ["first", "gate", "moe.choose", "small", "tied", "head", "last"])
def test_a_rule_takes_in_what_would_stay_high(name):
    assert name in choice_of(f"fp8-mixed; {name}=fp8").chosen


@pytest.mark.parametrize("number_format", ["bf16", "32"])
def test_a_rule_keeps_high_and_the_nearest_one_counts(number_format):
    choice = choice_of(f"fp8-mixed; middle={number_format}; moe.experts.*={number_format}; moe=fp8")
    assert choice.kept["middle"] == f"rule: middle={number_format}"
    assert choice.kept["moe.experts.3"] == f"rule: moe.experts.3={number_format}"
    assert {"moe.gate_proj", "moe.choose"} <= set(choice.chosen)


def test_forcing_odd_dims_is_an_error():
    with pytest.raises(
        PrecisionError, match=r"odd=fp8 takes in odd, which has 4113 inputs and.*16\nhint: add odd=bf16"
    ):
        choice_of("fp8-mixed; odd=fp8")


@pytest.mark.parametrize("name", ["attend", "normed"])
def test_what_cannot_be_converted_stays_although_forced(name):
    assert any(kept.startswith(name) for kept in choice_of(f"fp8-mixed; {name}=fp8").kept)


def test_a_rule_without_linear_layers_is_an_error():
    with pytest.raises(PrecisionError, match=r"rule embed=fp8 names a module without nn\.Linear layers"):
        choice_of("fp8-mixed; embed=fp8")


def test_subclasses_patches_and_adapters_stay():
    class Own(nn.Linear):
        def forward(self, x):
            return x

    model = nn.Sequential(*[big() for _ in range(4)], nn.ModuleDict({"lora_A": big(BIG, 16)}), big())
    model[1] = Own(BIG, WIDE, device="meta")
    model[2].forward = lambda x: x
    kept = choice_of("fp8-mixed; *=fp8", model).kept
    assert kept["1"].startswith("not convertible: a Own")
    assert kept["2"] == "not convertible: something has replaced its forward already"
    assert kept["4.lora_A"].startswith("adapter")
    assert set(kept) == {"1", "2", "4.lora_A"}
    assert "4.lora_A" in choice_of("fp8-mixed; 4.lora_A=fp8", model).chosen


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("inputs", [512, 1024, 1040, 2048, 2064, 4096, 4112])
@pytest.mark.parametrize("outputs", [512, 1024, 1040, 2048, 2064, 4096, 4112])
def test_limits_of_size_are_torchaos(scaling, inputs, outputs):
    """torchao's filters are private, so their numbers are written down and held against them here."""
    from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

    takes = _auto_filter_for_recipe(scaling, [])(nn.Linear(inputs, outputs, device="meta"), "layer")
    assert bool(too_small(scaling, inputs, outputs)) is not takes


def test_conv1d_is_told_as_not_convertible(zoo):
    choice = choice_of("fp8-mixed", zoo["gpt2"].build())
    assert choice.kept["transformer.h.0.attn.c_attn"].startswith("not convertible: a Conv1D of transformers")
    assert not choice.chosen and "not convertible" in str(choice)


def test_odd_dims_names_what_is_odd():
    assert odd_dims(64, 32) == ""
    assert odd_dims(64, 33) == "odd dims: 33 outputs, fp8 products need multiples of 16"

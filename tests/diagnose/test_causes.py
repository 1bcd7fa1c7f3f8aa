"""How an eps that was lost is followed back, and what the table says of what it does not know."""

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.diagnose.causes import cause_of, limit_of
from floatline.diagnose.causes.cause import lost_eps, lost_gap
from floatline.observe.finite import Made, Origin, Spot
from floatline.observe.finite.origins import Kind


def made(op, dtype="float16", before=(), **scalars):
    return Made(
        spot=Spot(op=op, module="", user=None, library=None), scalars=scalars, dtype=dtype, before=tuple(before)
    )


@pytest.mark.parametrize(
    ("maker", "eps"),
    [
        (made("add", other=1e-8), 1e-8),
        (made("clamp_min_", min=1e-9), 1e-9),
        (made("sqrt", before=[made("add_", other=1e-8)]), 1e-8),
        (made("mul", before=[made("sqrt", before=[made("mean", before=[made("add", other=1e-12)])])]), 1e-12),
        (made("add", dtype="float32", other=1e-8), None),
        (made("add", dtype="bfloat16", other=1e-8), None),
        (made("add", other=1e-4), None),
        (made("mul", other=1e-8), None),
        (made("exp", before=[made("add", other=1e-8)]), None),
        (None, None),
    ],
)
def test_an_eps_that_the_format_cannot_hold(maker, eps):
    found = lost_eps(maker)
    assert (found and found[0]) == eps


@pytest.mark.parametrize(
    ("maker", "bound"),
    [
        (made("clamp", dtype="bfloat16", min=1e-6, max=1 - 1e-6), 1 - 1e-6),
        (made("rsub", dtype="float16", other=1, before=[made("clamp", max=0.9999)]), 0.9999),
        (made("clamp", dtype="float32", max=1 - 1e-6), None),
        (made("clamp", dtype="bfloat16", max=0.99), None),
        (made("add", dtype="bfloat16", other=1.0), None),
    ],
)
def test_a_bound_that_the_format_rounds_to_one(maker, bound):
    found = lost_gap(maker)
    assert (found and found[0]) == bound


def test_the_line_of_the_eps_is_the_one_to_change():
    model, x = nn.Linear(4, 4).half(), torch.zeros(3, 4).half()
    with torch.no_grad():
        model.bias.zero_()

    def forward():
        length = model(x).pow(2).sum(-1).sqrt() + 1e-8
        return (model(x) / length[:, None]).float().sum()

    finding = fl.diagnose(forward, model)
    first = forward.__code__.co_firstlineno
    assert finding.cause_name == "eps underflow" and finding.location.line == first + 2
    assert finding.remedy.startswith(f"{__file__}:{first + 1}: take an eps that float16 can hold")
    assert f"{__file__}:{first + 1}" in finding.cause


def test_what_is_not_in_the_table_says_so():
    spot = Spot(op="mystery", module="", user=None, library=None)
    cause = cause_of(Origin(number=1, kind=Kind.FAULT, phase="forward", spot=spot, ran="mystery"))
    assert cause.name == "unknown" and cause.untried == "the cause is not in the table"


def test_limits():
    assert limit_of("float16") == 65504 and limit_of("int64") is None and limit_of("nothing") is None

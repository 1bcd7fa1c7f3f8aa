"""Infinities that a program means."""

import pytest
import torch
from torch.nn import functional as F

from floatline.observe.finite import Kind, watching
from floatline.observe.finite.meant import base, floats_in, is_mask

INF = float("inf")


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        ([0.0, -INF, 0.0], True),
        ([-INF, -INF], True),
        ([INF, INF], True),
        (INF, True),
        ([0.0, INF], False),
        ([1.0, -INF], False),
        ([0.0, float("nan")], False),
        (float("nan"), False),
    ],
)
def test_constants_that_are_infinite_on_purpose(values, mask):
    assert is_mask(torch.tensor(values)) == mask


def kinds(program):
    with watching() as watch:
        program()
    return [(origin.ran, origin.kind) for origin in watch.origins]


def test_fills_are_meant():
    x = torch.ones(3)
    assert kinds(lambda: x.masked_fill(torch.tensor([True, False, False]), -INF)) == [("masked_fill", Kind.MEANT)]
    assert kinds(lambda: torch.full((2,), INF)) == [("full", Kind.MEANT)]
    assert kinds(lambda: F.pad(x, (1, 1), value=-INF)) == [("constant_pad_nd", Kind.MEANT)]


def test_the_logarithm_of_a_mask_is_meant_and_that_of_a_saturated_probability_is_not():
    mask = torch.tensor([1.0, 0.0])
    weight = torch.tensor([1000.0, -1000.0])
    assert kinds(lambda: mask.log()) == [("log", Kind.MEANT)]
    assert kinds(lambda: (mask > 0).float().log()) == [("log", Kind.MEANT)]
    assert kinds(lambda: weight.sigmoid().log()) == [("log", Kind.FAULT)]
    assert kinds(lambda: mask.clone().requires_grad_().log()) == [("log", Kind.FAULT)]


def test_nan_of_a_mask_is_a_fault():
    scores = torch.full((2, 2), -INF)
    assert kinds(lambda: scores.softmax(-1)) == [("_softmax", Kind.MEANT), ("_softmax", Kind.FAULT)]
    assert ("sub", Kind.FAULT) in kinds(lambda: scores - scores)


def test_x_log_x_blames_the_logarithm_and_a_mask_by_multiplication_the_product():
    p = torch.tensor([1.0, 0.0])
    with watching() as watch:
        y = p * p.log()
    assert {(o.ran, o.kind) for o in watch.ledger.of(y)} == {("log", Kind.FAULT)}
    with watching() as watch:
        y = p * p.masked_fill(p == 0, -INF)
    assert {(o.ran, o.kind) for o in watch.ledger.of(y)} == {("mul", Kind.FAULT)}


def test_helpers():
    assert list(floats_in([1.0, (2.0, 3), "x", True])) == [1.0, 2.0]
    assert (base("log_"), base("log"), base("_softmax")) == ("log", "log", "_softmax")

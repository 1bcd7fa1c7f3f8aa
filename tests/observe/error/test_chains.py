"""Sums in a loop: what stands still is told from what moves slowly and is rounded well."""

import torch
from torch import nn

from floatline.observe.error import metering
from floatline.observe.error.chains import Chains


def lost(rate, turns, keep=1.0):
    """The loss of `total = keep * total + rate` in bf16, from 0."""
    chains, low, exact, said = Chains(), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.float64), None
    for _ in range(turns):
        before = keep * exact
        low, exact = keep * low + rate, keep * exact + rate
        said = chains.follow("line", low, exact, [(before, before)])
    return said or 0.0


def test_a_count_stops_at_256():
    assert abs(lost(1.0, 512) - 0.5) < 0.01
    assert lost(1.0, 200) == 0.0


def test_an_average_that_forgets_slowly_stops_on_its_way():
    assert lost(0.002, 600, keep=0.998) > 0.1
    assert lost(0.5, 600, keep=0.5) < 0.05


def test_a_value_that_moves_slowly_and_is_rounded_well_is_not_lost():
    chains = Chains()
    for turn in range(400):
        exact = torch.full((3,), 1 + turn / 4000, dtype=torch.float64)
        before = exact - 1 / 4000
        said = chains.follow("line", exact.bfloat16(), exact, [(before.bfloat16(), before)])
        assert (said or 0.0) < 0.005


def test_results_that_do_not_go_into_the_next_call_are_no_sum():
    chains = Chains()
    for turn in range(50):
        exact = torch.full((3,), 1.0 + turn / 50, dtype=torch.float64)
        low = torch.ones(3, dtype=torch.bfloat16)
        assert chains.follow("line", low, exact, [(low + 7, exact + 7)]) is None


def test_what_never_arrives_at_a_sum_is_not_lost_in_it():
    """A router that chose other experts: their share is zero in the format, and something exactly."""
    chains, low, exact = Chains(), torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float64)
    for _ in range(30):
        before, exact = exact, exact + 0.01
        assert not chains.follow(
            "line", low, exact, [(low, before), (torch.zeros_like(low), torch.full_like(exact, 0.01))]
        )


def test_the_meter_sees_a_loop_of_in_place_additions():
    model = nn.Linear(1, 1, bias=False)
    with metering(model) as meter:
        meter.enter("forward")
        total = torch.zeros(2, dtype=torch.bfloat16)
        for _ in range(512):
            total += 1.0
    stalls = [reading.stalled for reading in meter.readings if reading.ran == "add_"]
    assert len(stalls) == 1 and abs(stalls[0] - 0.5) < 0.01

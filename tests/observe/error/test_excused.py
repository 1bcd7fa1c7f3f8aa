"""Whose fault an infinity or a zero is."""

import torch

from floatline.observe.error import metering
from floatline.observe.error.measures import Measure, measure, overflows


def readings(program):
    with metering() as meter:
        meter.enter("forward")
        program()
    return {reading.ran: reading for reading in meter.readings}


def test_only_the_op_whose_result_does_not_fit_overflows():
    x = torch.full((4,), 300.0, dtype=torch.float16)
    said = readings(lambda: (x * x).sqrt())
    assert said["mul"].measure.overflow == 1.0
    assert said["sqrt"].measure.overflow == 0.0 and said["sqrt"].measure.error == 0.0
    said = readings(lambda: (x * x) + 5.0)
    assert said["add"].measure.overflow == 1.0  # its own result does not fit either


def test_what_the_format_could_hold_but_is_zero_was_rounded_away():
    one, small = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 1e-5, dtype=torch.bfloat16)
    cancelled = readings(lambda: (one + small) - one)["sub"].measure
    assert cancelled.underflow == 0.0 and cancelled.error == 1.0
    flushed = readings(lambda: small.half() * small.half())["mul"].measure
    assert flushed.underflow == 1.0 and flushed.underflow_error == 1.0


def test_fills_of_masks_and_infinities_do_not_overflow():
    assert overflows(torch.tensor([1.0, 7e4]), torch.float16)
    assert not overflows(torch.tensor([1.0, 7e4]), torch.bfloat16)
    assert not overflows(torch.tensor([1.0, -1e9, float("-inf")]), torch.float16)
    assert not overflows(torch.tensor([]), torch.float16)
    assert not overflows(torch.tensor([65510.0]), torch.float16)  # rounds to 65504


def test_calls_of_one_line_weigh_by_their_size():
    def of(exact, low):
        return measure(torch.tensor([exact]).double(), torch.tensor([low]).bfloat16(), None, None)

    large, small = of(8.0, 8.0), of(0.25, 0.5)
    assert isinstance(large, Measure) and small.error == 1.0
    assert large.worst(small).error == 1.0
    assert abs(large.joined(small).error - 0.25 / (64 + 0.0625) ** 0.5) < 1e-6
    infinite = of(1.0, float("inf"))
    assert large.joined(infinite).error == float("inf")

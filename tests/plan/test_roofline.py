from __future__ import annotations

import pytest
from small_work import blocks

from floatline.hardware import lookup, resolve
from floatline.observe.events import Category, OpCost, Phase, Storage, Trace
from floatline.observe.trace import trace
from floatline.plan.roofline import (
    BANDWIDTH_SHARE,
    LAUNCH_SECONDS,
    MATRIX_SHARE,
    assumptions,
    bus_rate,
    rate_of,
    update_time,
)

T4 = lookup("t4")


def traced(flops: int, nbytes: int, calls: int = 1, dtype: str = "float16") -> Trace:
    made = Trace(begins=[0])
    made.costs[Phase.FORWARD, "aten.mm", dtype, flops, nbytes] = OpCost(calls, flops, nbytes)
    return made


def test_the_longest_of_three_times_counts():
    assert update_time(traced(65 * 10**12, 0), T4).compute == pytest.approx(1 / MATRIX_SHARE)
    assert update_time(traced(0, 320 * 10**9), T4).memory == pytest.approx(1 / BANDWIDTH_SHARE)
    assert update_time(traced(1, 1, calls=1000), T4).launch == pytest.approx(1000 * LAUNCH_SECONDS)


def test_a_format_without_units_runs_at_fp32s_rate():
    assert rate_of(T4, "bfloat16") == rate_of(T4, "float32") == pytest.approx(8.1e12 * MATRIX_SHARE)


def test_the_bus_counts_where_it_takes_longer_than_the_work():
    made = traced(65 * 10**12, 0)
    made.storages = [Storage(24 * 10**9, Category.ACTIVATION, "", "", Phase.FORWARD, 0, host=True)]
    made.host_events = [(0, 24 * 10**9)]
    time = update_time(made, T4)
    assert time.bus == pytest.approx(24e9 / bus_rate(T4) - 1 / MATRIX_SHARE)
    assert time.seconds == pytest.approx(24e9 / bus_rate(T4))


def test_checkpointing_multiplies_again_what_it_must_and_fp16_is_faster():
    plain = trace(blocks(4096), hardware="a100", precision="bf16-mixed")
    again = trace(blocks(4096), hardware="a100", precision="bf16-mixed", techniques=["checkpointing"])
    # A layer has two products. The second one's result is saved by nothing, so only the first is made again: 3.5 of 3.
    assert again.flops / plain.flops == pytest.approx(3.5 / 3, rel=0.01)
    slow = trace(blocks(4096), hardware="t4", precision="32-true")
    fast = trace(blocks(4096), hardware="t4", precision="16-mixed")
    assert update_time(fast, T4).seconds < update_time(slow, T4).seconds


def test_what_it_rests_on_is_said():
    assert "roofline" in assumptions(T4)[0] and "320 GB/s" in assumptions(T4)[0]
    assert "assumed" in assumptions(resolve("cpu"))[0]

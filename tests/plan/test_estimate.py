from __future__ import annotations

import pytest
import torch
from small_work import MIB, blocks, card, fused
from torch import nn

import floatline as fl
from floatline.errors import ConfigError
from floatline.observe.events import peak_of
from floatline.observe.target import workspaces
from floatline.observe.trace import trace
from floatline.plan.allocator import AllocatorSettings, simulate
from floatline.plan.estimate import estimate, smallest_device


def parameter_bytes(work: fl.Workload) -> int:
    return sum(4 * parameter.numel() for parameter in work.build_model().parameters())


def test_states_are_exact():
    work = blocks()
    made = estimate(work, "a100-40gb", "bf16-mixed")
    size = parameter_bytes(work)
    assert made.states["parameters"] == size
    assert made.states["optimizer state"] == pytest.approx(2 * size, abs=4 * 1000)  # and a step count each
    assert made.peak_allocated <= made.peak_reserved <= made.peak_total - made.context
    assert made.workspaces == workspaces(made.hardware)


def test_techniques_save_what_they_are_for():
    plain = estimate(blocks(), "a100-40gb", "bf16-mixed")
    again = estimate(blocks(), "a100-40gb", "bf16-mixed", ["checkpointing"])
    away = estimate(blocks(), "a100-40gb", "bf16-mixed", ["offload"])
    held = {name: entry.categories["activations"] for name, entry in
            {"plain": plain, "again": again, "away": away}.items()}  # fmt: skip
    assert again.peak_allocated < plain.peak_allocated and away.peak_allocated < plain.peak_allocated
    assert held["again"] < 0.5 * held["plain"]
    assert away.host_peak > 0 == plain.host_peak


def test_a_fused_optimizer_has_no_temporaries():
    loop = estimate(blocks(rows=1), "a100-40gb", "32-true")
    one_kernel = estimate(blocks(rows=1, optimizer=fused), "a100-40gb", "32-true")
    assert loop.timeline.op == "aten._foreach_sqrt"
    assert loop.peak_allocated - one_kernel.peak_allocated > 0.5 * parameter_bytes(blocks())


def test_inference_keeps_no_gradients():
    made = estimate(blocks(), "t4", "16-true", mode="inference")
    assert set(made.states) <= {"parameters", "buffers", "inputs", "activations"}
    assert made.states["parameters"] == parameter_bytes(blocks()) // 2
    assert made.peak_allocated < estimate(blocks(), "t4", "16-mixed").peak_allocated


def test_on_a_cpu_nothing_is_rounded_or_outside():
    made = estimate(blocks(rows=8), "cpu", "32-true")
    assert made.peak_allocated == made.peak_reserved == made.peak_total
    assert made.context == made.workspaces == 0


@pytest.mark.parametrize("techniques", [[], ["checkpointing"], ["low_bit_optimizer"], ["accumulation"], ["offload"]])
def test_one_update_repeated_is_two_updates(techniques):
    two = estimate(blocks(), "a100-40gb", "bf16-mixed", techniques)
    one = estimate(blocks(), "a100-40gb", "bf16-mixed", techniques, quick=True)
    assert one.peak_allocated == two.peak_allocated
    assert one.states == pytest.approx(two.states, abs=4096)


@pytest.mark.parametrize("technique", ["optimizer_offload", "kahan"])
def test_where_the_first_update_differs_both_are_run(technique):
    precision = "bf16-true" if technique == "kahan" else "bf16-mixed"
    two = trace(blocks(), hardware="a100", precision=precision, techniques=[technique])
    one = trace(blocks(), hardware="a100", precision=precision, techniques=[technique], quick=True)
    assert len(one.events) == len(two.events)
    assert peak_of(one.events)[0] == peak_of(two.events)[0]


def test_short_of_memory_the_allocator_gives_back_and_goes_on():
    # 60 MiB that are freed before 80 are wanted: 140 reserved, 80 would do
    events = [(0, 60 * MIB), (0, -60 * MIB), (1, 80 * MIB), (1, -80 * MIB)]
    replay = simulate(events)
    assert replay.peak_reserved == 140 * MIB
    assert smallest_device(events, replay, 200 * MIB, AllocatorSettings()) == 140 * MIB
    assert smallest_device(events, replay, 100 * MIB, AllocatorSettings()) == pytest.approx(80 * MIB, rel=0.03)
    assert smallest_device(events, replay, 70 * MIB, AllocatorSettings()) >= 80 * MIB


def test_the_verdict_follows_the_card():
    peak = estimate(blocks(), card(40_000), "bf16-mixed").peak_total / MIB
    assert estimate(blocks(), card(peak + 400), "bf16-mixed").verdict == "fits"
    assert estimate(blocks(), card(peak / 2), "bf16-mixed").verdict == "does not fit"


def test_json_has_plain_values():
    import json

    text = json.dumps(estimate(blocks(rows=8), "t4").as_dict())
    assert json.loads(text)["precision"] == "16-mixed"


def test_bad_settings():
    with pytest.raises(ConfigError, match="mode is 'serve'"):
        estimate(blocks(rows=2), "t4", mode="serve")
    with pytest.raises(ConfigError, match="unknown hardware 't5'"):
        estimate(blocks(rows=2), "t5")
    with pytest.raises(ConfigError, match="bf16"):
        estimate(blocks(rows=2), "t4", "bf16-mixed")


def test_a_module_is_not_touched():
    model = nn.Linear(64, 64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    work = fl.Workload(model=model, batch=lambda: (torch.ones(2, 64),), loss=lambda m, b: m(*b).sum())
    estimate(work, "t4")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_that_falls_back_is_told_with_the_reason():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kv = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x):
            q = self.q(x).view(2, 16, 4, 16).transpose(1, 2)
            k = v = self.kv(x).view(2, 16, 2, 16).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).square().mean()

    work = fl.Workload(model=Grouped, batch=lambda: (torch.ones(2, 16, 64),))
    (note,) = estimate(work, "t4").notes
    assert "math kernel" in note and "efficient: it needs the same batch and heads" in note
    assert estimate(work, "a100-40gb").notes == ()

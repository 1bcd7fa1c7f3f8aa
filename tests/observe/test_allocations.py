"""Allocations: what the real allocator counts."""

import torch
from torch import nn

from floatline.observe.allocations import record_allocations

CPU = torch.device("cpu")
MIB = 2**18  # floats


def test_peak_marks_and_end():
    before = torch.empty(MIB)
    with record_allocations(CPU) as seen:
        kept = torch.empty(MIB)
        seen.mark("one")
        gone = torch.empty(3 * MIB)
        seen.mark("four")
        del gone
        seen.mark("back")
        seen.mark("four")
    assert seen.marks == {"one": 2**20, "four": 2**20, "back": 2**20}  # the last call of a name counts
    assert seen.peak == 4 * 2**20 and seen.end == 2**20
    assert kept.numel() == before.numel()


def test_memory_that_was_there_before_and_is_freed_counts_down():
    with record_allocations(CPU) as first:
        model = nn.Linear(512, 512, bias=False)
        model(torch.ones(1, 512)).sum().backward()
    assert first.end >= 2 * 2**20  # weights and gradient
    with record_allocations(CPU) as second:
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
    assert 2 * 2**20 <= second.end < 2 * 2**20 + 1000  # two moments


def test_nothing_is_nothing():
    with record_allocations(CPU) as seen:
        seen.mark("here")
    assert (seen.peak, seen.end, seen.marks) == (0, 0, {"here": 0})

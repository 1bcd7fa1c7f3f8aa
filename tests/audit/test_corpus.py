"""Every planted fault is found where it is and as what it is, and nothing is asked of what is healthy."""

import copy

import pytest
import torch
from audit_corpus import FAULTS, HEALTHY
from audit_corpus.cases import witness_of

SHOWN = 0.05
"""A plain run that is as far off as this shows the fault; without the fault it is less than half as far off."""
SEEN = [fault for fault in FAULTS if fault.witness != "later"]


def names(cases):
    return [case.name for case in cases]


@pytest.mark.parametrize("fault", SEEN, ids=names(SEEN))
def test_the_fault_is_there_without_asking_the_audit(fault):
    torch.manual_seed(0)
    with_it = witness_of(fault, True)
    torch.manual_seed(0)
    without = witness_of(fault, False)
    assert with_it > SHOWN and without < SHOWN / 2, (with_it, without)


@pytest.mark.parametrize("increments", [torch.ones(3000), torch.rand(3000) + 0.1])
def test_a_running_total_kept_in_bf16_stands_still(increments):
    """What cumsum, scatter_add and index_add come to where a kernel keeps its total in the result's format."""
    total = torch.zeros((), dtype=torch.bfloat16)
    for one in increments.bfloat16():
        total = total + one
    assert total < 0.4 * increments.sum()


def test_thresholds_and_choices_come_out_otherwise_in_bf16():
    def flips(choose):
        return float((choose(torch.float32) != choose(torch.bfloat16)).float().mean())

    torch.manual_seed(0)
    scores = torch.sigmoid(0.002 * torch.randn(1000))
    assert flips(lambda dtype: scores.to(dtype) > 0.5006) > 0.05
    logits = torch.randn(1000, 8) + 40
    assert flips(lambda dtype: logits.to(dtype).softmax(-1).topk(2, -1).indices) > 0.05


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.phase == "optimizer"], ids=lambda fault: fault.name)
def test_plain_bf16_updates_are_lost(fault):
    torch.manual_seed(0)
    program = fault.build(True)
    ways = []
    for dtype in (torch.float64, torch.bfloat16):
        model = copy.deepcopy(program.model).to(dtype)
        start = model.up.weight.detach().double().clone()
        optimizer = program.optimizer(model.parameters())
        for _ in range(30):
            optimizer.zero_grad()
            program.loss(model, tuple(t.to(dtype) for t in program.batch)).backward()
            optimizer.step()
        ways.append((model.up.weight.detach().double() - start).norm())
    assert ways[0] > 0 and ways[1] < ways[0] / 2

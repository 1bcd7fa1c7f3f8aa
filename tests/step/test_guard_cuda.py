"""On a GPU: nothing in a step waits for the device, and what is condemned is suppressed by select."""

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.step import What

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAN = float("nan")


def make(precision, **guard):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 4)).cuda()
    step = fl.TrainStep(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        precision,
        loss=lambda m, b: m(b).float().square().mean(),
        guard=fl.Guard(**{"sample_every": None, **guard}),
    )
    if step.scaling.active:  # a scale at which the good updates do not overflow
        step.scaling.set(64.0)
    return step


@pytest.fixture
def no_waiting():
    """A function that makes each wait for the device an error, and ends that after the test."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_never_waits_for_the_device(precision, micro_batches, no_waiting):
    step = make(precision)
    good = [torch.randn(8, 16, device="cuda") for _ in range(micro_batches)]
    bad = [torch.full((8, 16), NAN, device="cuda"), *good[1:]]
    for _ in range(2):  # the first updates make the optimizer's state
        step(list(good))
    torch.cuda.synchronize()
    no_waiting()
    outs = [step(list(batches)) for batches in (good, bad, good, good)]
    torch.cuda.set_sync_debug_mode("default")
    assert [bool(out.applied) for out in outs] == [True, False, True, True]
    assert step.sentinel.faults == 1 and step.sentinel.skips[-1].step == 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_bad_batch_changes_nothing_and_is_known_a_step_later(precision):
    step = make(precision)
    good = torch.randn(8, 16, device="cuda")
    for _ in range(2):
        step(good)
    before = [t.detach().clone() for t in (*step.model.parameters(), *step.model.buffers())]
    moments = [v.clone() for state in step.optimizer.state.values() for v in state.values()]
    out = step(torch.full((8, 16), NAN, device="cuda"))
    now = (*step.model.parameters(), *step.model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    after = [v for state in step.optimizer.state.values() for v in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert step.sentinel.faults == 0 and not out.applied
    step(good)
    assert step.sentinel.faults == 1 and step.sentinel.skips[-1].what is What.LOSS


def test_a_rollback_takes_the_update_after_the_fault_back():
    step = make("bf16-mixed", on_fault="rollback", snapshot_every=2)
    good = torch.randn(8, 16, device="cuda")
    for _ in range(2):
        step(good)
    before = [p.detach().clone() for p in step.model.parameters()]
    assert step(torch.full((8, 16), NAN, device="cuda")).rolled_back_to is None
    assert step(good).rolled_back_to == 2 == step.updates
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))

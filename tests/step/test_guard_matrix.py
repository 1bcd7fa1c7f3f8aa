"""The guard with every technique, in every precision, for every policy: a spanning set of all combinations.

Every two settings meet in some case. Whatever the combination: no weight, buffer, moment or master weight is ever
non-finite, the fault is counted, skipping and stopping leave everything as it was, and after a rollback the run is
equal to the bit to one that never met the fault.
"""

import itertools

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import NonFiniteError
from floatline.step.readback import Readback

TECHNIQUES = ["", "accumulation(micro_batches=2)", "checkpointing", "lora(rank=2, targets=['blocks.*.up'])",
              "freezing(modules=['blocks.0'])", "offload(to=disk, min_bytes=0)", "low_bit_optimizer",
              "optimizer_offload", "optimizer_in_backward", "kahan", "stochastic_rounding", "master_weights",
              "compile(backend=eager)"]  # fmt: skip
SETTINGS = {
    "technique": TECHNIQUES,
    "precision": ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"],
    "check": ["before-backward", "after-backward"],
    "on_fault": ["skip", "rollback", "stop"],
    "fault": ["data", "gradient"],
    "at": [0, 3, 4],  # before the first update, in the update of a snapshot, right after it
    "late": [False, True],  # verdicts that are read an update later, as those of a GPU are
}
IN_BACKWARD, RUN = "optimizer_in_backward", 8


def possible(case):
    return not (case["technique"] == IN_BACKWARD and case["precision"].startswith("16"))  # refused, tested elsewhere


def pairs(case):
    return set(itertools.combinations(sorted(case.items()), 2))


def spanning():
    """One case a technique and precision, then more; each is the one that adds the most pairs that have not met."""
    met, cases = set(), []
    names = list(SETTINGS)
    everything = [dict(zip(names, values, strict=True)) for values in itertools.product(*SETTINGS.values())]
    by_head = {}
    for case in filter(possible, everything):
        by_head.setdefault((case["technique"], case["precision"]), []).append((case, pairs(case)))
    for choices in [*by_head.values(), *by_head.values()]:
        case, new = max(choices, key=lambda choice: len(choice[1] - met))
        if new - met:
            cases.append(case)
            met |= new
    return cases


CASES = spanning()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 6)

    def forward(self, x):
        return x + nn.functional.dropout(self.down(torch.relu(self.norm(self.up(x)))), 0.1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make(case):
    torch.manual_seed(0)
    return fl.TrainStep(
        Net(),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        case["precision"],
        loss=lambda m, b: m(b.to(next(m.parameters()).dtype)).float().square().mean(),
        max_grad_norm=None if case["technique"] == IN_BACKWARD else 1.0,
        guard=fl.Guard(on_fault=case["on_fault"], check=case["check"], snapshot_every=4, sample_every=3),
        techniques=[case["technique"]] if case["technique"] else [],
        schedule=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20),
    )


def batch(number):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(number))


def tensors(step):
    """Everything that a fault may not reach: weights, buffers, master weights and moments, by parameter."""
    parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
    state = [v for p in parameters for v in step.optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    found = [*step.model.parameters(), *step.model.buffers(), *step.masters.state(), *state]
    plain = (torch.Tensor, nn.Parameter)
    return [(t if type(t) in plain else t.dequantize()).detach().clone() for t in found]  # low-bit state


def finite(step):
    return all(bool(t.isfinite().all()) for t in tensors(step))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def meet_fault(step, fault):
    """Make an update that goes wrong; returns what it went back to."""
    if fault == "data":
        out = step(torch.full((4, 6), float("nan")))
    else:
        if step.scaling.active:
            step.scaling.tensor().fill_(1.0)  # else it would be an overflow, which is routine
        weight = next(p for p in step.model.parameters() if p.requires_grad)
        handle = weight.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
        out = step(batch(99))
        handle.remove()
    assert not bool(out.applied)
    return out.rolled_back_to if out.rolled_back_to is not None else step.read_verdict()


def test_every_two_settings_meet():
    wanted = set()
    for one, other in itertools.combinations(SETTINGS, 2):
        for a, b in itertools.product(SETTINGS[one], SETTINGS[other]):
            if possible({"technique": "", "precision": ""} | {one: a, other: b}):
                wanted |= pairs({one: a, other: b})
    assert wanted <= set().union(*map(pairs, CASES)) and len(CASES) <= 70  # the product has 4536


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_a_fault_changes_nothing(case, monkeypatch):
    if case["late"]:
        monkeypatch.setattr(Readback, "waits", property(lambda readback: True))
    step = make(case)
    first = 6 if step.scaling.active else 0  # fp16 looks for its loss scale first
    for number in range(first + case["at"]):
        step(batch(number))
    before, done = tensors(step), step.updates
    step.read_verdict()
    faults = step.sentinel.faults
    if case["on_fault"] == "stop":
        with pytest.raises(NonFiniteError, match="stopped at the first fault"):
            meet_fault(step, case["fault"])
        back = None
    else:
        back = meet_fault(step, case["fault"])
    assert step.sentinel.faults == faults + 1 and step.sentinel.skips[-1].step == done + 1 and finite(step)
    partly = case["technique"] == IN_BACKWARD and case["fault"] == "gradient"  # its file says so
    if case["on_fault"] != "rollback":
        assert back is None and (partly or same(tensors(step), before))
        return
    for number in range(back, first + RUN):
        step(batch(number))
        assert finite(step)
    plain = make(case)
    for number in range(first + RUN):
        plain(batch(number))
    assert same(tensors(step), tensors(plain)) and step.updates == plain.updates
    assert step.schedule.state_dict() == plain.schedule.state_dict()
    assert step.scaling.state_dict() == plain.scaling.state_dict()

"""Every planted fault is found where it is and as what it is, and nothing is asked of what is healthy."""

import copy
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from audit_corpus import FAULTS, HEALTHY
from audit_corpus.cases import outcome, witness_of

import floatline as fl
from floatline.observe.target import cuda_autocast
from floatline.precision import Policy

SHOWN = 0.05
"""A plain run that is as far off as this shows the fault; without the fault it is less than half as far off."""
SEEN = [fault for fault in FAULTS if fault.witness != "later"]
CURABLE = [fault for fault in FAULTS if fault.curable and fault.phase != "optimizer"]


def names(cases):
    return [case.name for case in cases]


def audited(program, fmt, mode, hardware):
    """The report and every failing op as (module, failure, phase, line), updates as those of the optimizer."""
    report = fl.audit(program.model, program.batch, program.loss, candidates=(fmt,), mode=mode, hardware=hardware,
                      optimizer=program.optimizer, repeats=0, probes=0)  # fmt: skip
    found = [(row.module, row.failure, row.phase, row.location.line if row.location else None)
             for row in report.failures]  # fmt: skip
    if program.optimizer is not None and fmt in report.updates:
        found += [(row.name.rpartition(".")[0], row.failure, "optimizer", None)
                  for row in report.updates[fmt].rows if row.failure]  # fmt: skip
    return report, found


@cache
def audit_of(fault, faulty):
    torch.manual_seed(0)
    return audited(fault.build(faulty), fault.format, fault.mode, fault.hardware)


def is_inside(name, islands):
    return any(name == island or name.startswith(f"{island}.") for island in islands)


@pytest.mark.parametrize("fault", FAULTS, ids=names(FAULTS))
def test_the_fault_is_found_where_it_is(fault):
    report, found = audit_of(fault, True)
    right = [f for f in found if f[0] in fault.modules and f[1] in fault.failure and f[2] == fault.phase]
    assert right, f"{found}\n{report}"
    candidate = report.candidates[fault.format]
    if fault.line is not None:
        assert any(line == fault.line for *_, line in right)
        assert any(f":{fault.line} " in advice for advice in candidate.advice), candidate.advice
    if fault.phase == "optimizer":
        assert candidate.advice
    elif fault.curable:
        assert candidate.policy is not None, candidate.reason
        assert any(is_inside(module, candidate.islands) for module in fault.modules), candidate.policy


@pytest.mark.parametrize("fault", FAULTS, ids=names(FAULTS))
def test_nothing_is_asked_for_without_the_fault(fault):
    report, found = audit_of(fault, False)
    candidate = report.candidates[fault.format]
    assert (candidate.policy, found) == (candidate.base, []), report


SETTINGS = [(case, setting) for case in HEALTHY for setting in case.settings]


@pytest.mark.parametrize("case, setting", SETTINGS, ids=["-".join([case.name, *setting]) for case, setting in SETTINGS])
def test_nothing_is_asked_of_what_is_healthy(case, setting):
    torch.manual_seed(0)
    report, found = audited(case.build(), *setting)
    candidate = report.candidates[setting[0]]
    assert (candidate.policy, found) == (candidate.base, []), report


@pytest.mark.parametrize("fault", CURABLE, ids=names(CURABLE))
def test_the_policy_trains_and_is_as_good_as_the_report_says(fault):
    candidate = audit_of(fault, True)[0].candidates[fault.format]
    torch.manual_seed(0)
    program = fault.build(True)
    exact = outcome(program, torch.float64, fault.mode, fault.hardware)[0]
    model = copy.deepcopy(program.model).eval()
    lists = cuda_autocast() if fault.hardware != "cpu" else nullcontext()
    loss = program.loss
    if loss is None and exact.numel() > 1:
        loss = lambda model, batch: (model(*batch) if isinstance(batch, tuple) else model(batch)).float().mean()  # noqa: E731
    with lists:
        step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=1e-6), precision=candidate.policy, loss=loss,
                            max_grad_norm=None, hardware="a100-40gb")  # fmt: skip
        outs = [step(program.batch)]
        while not bool(outs[-1].applied) and len(outs) < 17 and candidate.base.startswith("16"):
            outs.append(step(program.batch))
    assert str(step.policy) == candidate.policy == candidate.effect.policy
    assert bool(outs[-1].applied), "not even a smaller loss scale makes the gradients finite"
    if exact.numel() == 1:
        off = abs(float(outs[0].loss) - float(exact)) / abs(float(exact))
        # fp16 products of a CPU are the step's own; the audit computes them in fp32 and rounds once (fp16_products.py)
        assert off == pytest.approx(
            candidate.effect.loss_error, rel=0.05, abs=2e-4 if "16-" in candidate.base[:3] else 2e-5
        )


def test_a_policy_says_what_is_low_again_inside_of_an_island():
    """Modules of an island go back to the low format; what they give is fp32 for those around them."""
    torch.manual_seed(0)
    report, _ = audit_of(next(fault for fault in FAULTS if fault.name == "vit_value"), True)
    policy = Policy.parse(report.candidates["fp16"].policy)
    assert {rule.format for rule in policy.rules} == {"32", "16"}


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


def test_the_corpus_is_as_large_and_as_wide_as_it_says():
    assert len(FAULTS) >= 75 and len(HEALTHY) >= 29
    assert {fault.phase for fault in FAULTS} == {"forward", "backward", "buffer", "optimizer"}
    assert {failure for fault in FAULTS for failure in fault.failure} == {"range", "rounding", "stagnation"}
    assert {(fault.format, fault.mode) for fault in FAULTS} == {
        (f, m) for f in ("bf16", "fp16") for m in ("mixed", "true")
    }
    assert len(set(names(FAULTS))) == len(FAULTS)

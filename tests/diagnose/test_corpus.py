"""Every fault of the corpus is placed, and nothing is found where nothing is wrong."""

import pytest
import torch
from corpus import FAULTS, HEALTHY
from corpus.cases import ANY

from floatline.diagnose.diagnose import diagnose


def names(cases):
    return [case.name for case in cases]


@pytest.mark.parametrize("fault", FAULTS, ids=names(FAULTS))
def test_fault_is_placed(fault):
    torch.manual_seed(0)
    finding = diagnose(*fault.build())
    assert finding is not None
    said = {"phase": finding.phase, "op": finding.op, "module": finding.module, "cause": finding.cause_name}
    wanted = {"phase": fault.phase, "op": fault.op, "module": fault.module, "cause": fault.cause}
    if isinstance(fault.op, set) and finding.op in fault.op:
        wanted["op"] = finding.op
    if fault.line is not None:
        said["line"], wanted["line"] = finding.location and finding.location.line, fault.line
        said["file"], wanted["file"] = finding.location and finding.location.file, fault.build.__code__.co_filename
    for name in ("tensor", "samples"):
        if getattr(fault, name) is not None:
            said[name], wanted[name] = getattr(finding, name), getattr(fault, name)
    if fault.cured != ANY:
        said["cured"], wanted["cured"] = finding.counterfactual and finding.counterfactual.cured, fault.cured
    assert said == wanted, f"\n{finding}"


@pytest.mark.parametrize("case", HEALTHY, ids=names(HEALTHY))
def test_nothing_is_found_in_a_healthy_program(case):
    torch.manual_seed(0)
    finding = diagnose(*case.build())
    assert finding is None, f"\n{finding}"


def test_the_corpus_is_as_large_and_as_wide_as_it_says():
    assert len(FAULTS) >= 45 and len(HEALTHY) >= 18
    assert {fault.phase for fault in FAULTS} == {"input", "parameter", "buffer", "forward", "backward", "optimizer"}
    assert len(set(names(FAULTS))) == len(FAULTS)

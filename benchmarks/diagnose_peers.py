"""Who notices a fault, who places it: fl.diagnose, autograd's anomaly mode and transformers' hooks on one corpus.

The corpus is that of the tests (tests/diagnose/corpus): programs with a fault whose line, module and op are known, and
healthy ones in which infinities come and go. Each contestant gets each program anew. The corpus shaped fl.diagnose and
not the others: its own row says that nothing has been broken since, no more.

    noticed   it said that something is wrong
    placed    diagnose: phase, op, module and line are right; a NaN that was there before is named
              anomaly mode: the line is in its traceback of the forward
              transformers' DebugUnderflowOverflow: the module is the one it stopped in
    false     it spoke although nothing is wrong

Anomaly mode checks what a backward returns for NaN. DebugUnderflowOverflow checks what goes in and out of modules. What
they are not made for they cannot place; the table says how much that is.

    python benchmarks/diagnose_peers.py [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent.parent / "tests/diagnose"), str(Path(__file__).parent)]

from corpus import FAULTS, HEALTHY, Fault  # noqa: E402

import floatline as fl  # noqa: E402
from common import print_table, report  # noqa: E402

Verdict = tuple[bool, bool]
"""(noticed, placed)"""
PHASES = ("input", "parameter", "buffer", "forward", "backward", "optimizer")


def run(program: Any) -> None:
    """Run a step as a training loop does."""
    forward, _, *optimizer = program
    loss = forward()
    if loss.requires_grad:
        loss.backward()
    for one in optimizer:
        one.step()


def diagnose(build: Callable[[], Any], fault: Fault | None) -> Verdict:
    """Ask fl.diagnose."""
    finding = fl.diagnose(*build(), cures=False)
    if finding is None or fault is None:
        return finding is not None, False
    ops = fault.op if isinstance(fault.op, set) else {fault.op}
    right = finding.phase == fault.phase and finding.module == fault.module and finding.op in ops
    line = fault.line is None or (finding.location is not None and finding.location.line == fault.line)
    return True, right and line and fault.tensor in (None, finding.tensor)


def anomaly(build: Callable[[], Any], fault: Fault | None) -> Verdict:
    """Run under torch.autograd.detect_anomaly and read its traceback."""
    program = build()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly():
                run(program)
        except Exception as error:
            if "returned nan values" not in str(error):
                return False, False
            text = "\n".join(str(warning.message) for warning in said)
            return True, fault is not None and fault.line is not None and f"line {fault.line}, in" in text
    return False, False


def hooks(build: Callable[[], Any], fault: Fault | None) -> Verdict:
    """Run under transformers' DebugUnderflowOverflow and read which module it stopped in."""
    from transformers.debug_utils import DebugUnderflowOverflow

    program = build()
    with contextlib.redirect_stdout(io.StringIO()):
        debug = DebugUnderflowOverflow(program[1])
        frame, last = debug.create_frame, []

        def seen(module: torch.nn.Module, *values: Any) -> None:
            last[:] = [debug.module_names[module]]
            frame(module, *values)

        debug.create_frame = seen
        try:
            run(program)
        except Exception as error:
            if "inf/nan detected" not in str(error):
                return False, False
            return True, fault is not None and last == [fault.module]
    return False, False


CONTESTANTS = {"fl.diagnose": diagnose, "anomaly mode": anomaly, "DebugUnderflowOverflow": hooks}


def count() -> list[dict[str, Any]]:
    """Run all contestants on all programs; return a row for each contestant."""
    rows = []
    for name, ask in CONTESTANTS.items():
        noticed: Counter[str] = Counter()
        placed: Counter[str] = Counter()
        for fault in FAULTS:
            torch.manual_seed(0)
            spoke, right = ask(fault.build, fault)
            noticed[fault.phase] += spoke
            placed[fault.phase] += right
        false = 0
        for case in HEALTHY:
            torch.manual_seed(0)
            false += ask(case.build, None)[0]
        rows.append({"contestant": name, "noticed": dict(noticed), "placed": dict(placed), "false": false})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = count()
    faults = Counter(fault.phase for fault in FAULTS)
    header = ["noticed, placed of", *(f"{phase} ({faults[phase]})" for phase in PHASES),
              f"all ({len(FAULTS)})", f"false of {len(HEALTHY)}"]  # fmt: skip
    print_table(header, [[row["contestant"],
                          *(f"{row['noticed'].get(phase, 0)}, {row['placed'].get(phase, 0)}" for phase in PHASES),
                          f"{sum(row['noticed'].values())}, {sum(row['placed'].values())}", str(row["false"])]
                         for row in rows])  # fmt: skip
    report(rows, ("torch", "transformers"), options.json, faults=dict(faults), healthy=len(HEALTHY))


if __name__ == "__main__":
    main()

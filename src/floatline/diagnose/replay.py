"""Run a condemned step again: does it fail as it did, and what is the first bad op?

A replay that fails says so in one of three ways, and one that does not is honest about it:

    reproduced       in eager mode, as the diagnosis runs it
    only compiled    the compiled step fails and the eager one does not: the compiler's doing
    not reproduced   neither fails: hardware, a race, the order of data, or weights that are not the same any more
    not run          the bundle has none of the micro-batches that may be at fault
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from floatline.diagnose.bundle import Bundle
from floatline.diagnose.diagnose import diagnose
from floatline.diagnose.finding import Finding
from floatline.diagnose.kept import everything_kept
from floatline.observe.finite import is_bad
from floatline.step.random_state import set_generators
from floatline.step.sentinel import Rerun
from floatline.step.step import TrainStep


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of it.

    Attributes:
        update: Which update it was.
        outcome: "reproduced", "only compiled", "not reproduced" or "not run".
        finding: The first bad op, where it was reproduced.
        micro_batch: In which micro-batch.
        note: What the outcome means, and what the bundle had no room for.
    """

    update: int
    outcome: str
    finding: Finding | None = None
    micro_batch: int | None = None
    note: str = ""

    @property
    def at_fault(self) -> bool:
        """Whether something is wrong with the step."""
        return self.outcome in ("reproduced", "only compiled")

    def __str__(self) -> str:
        lines = [f"update {self.update}: {self.outcome}" + (f"; {self.note}" if self.note else "")]
        if self.finding is not None:
            lines += ["", str(self.finding)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        finding = self.finding.as_dict() if self.finding is not None else None
        return {"update": self.update, "outcome": self.outcome, "note": self.note, "micro_batch": self.micro_batch,
                "finding": finding}  # fmt: skip


def replay(bundle: Bundle, step: TrainStep) -> Replay:
    """Diagnose a bundle on a step that has its weights and buffers.

    Args:
        bundle: The condemned step.
        step: A step of the same model, precision and techniques.
    """
    suspects = [p for p in bundle.suspects or range(len(bundle.reruns)) if bundle.reruns[p].batch is not None]
    if not suspects:
        note = "; ".join(filter(None, ("there is no batch to run", _missing(bundle))))
        return Replay(update=bundle.update, outcome="not run", note=note)
    for place in suspects:
        finding = diagnose_rerun(step, bundle.reruns[place])
        if finding is not None:
            return Replay(
                update=bundle.update, outcome="reproduced", finding=finding, micro_batch=place, note=_missing(bundle)
            )
    if step.stack.find("compile") is not None:
        for place in suspects:
            if _fails(step, bundle.reruns[place]):
                note = "the compiled step is not finite, the eager one is: look at the compiler, or leave it out"
                return Replay(update=bundle.update, outcome="only compiled", micro_batch=place, note=note)
    return Replay(update=bundle.update, outcome="not reproduced", note=_why_not(bundle))


def diagnose_rerun(step: TrainStep, rerun: Rerun) -> Finding | None:
    """Diagnose one micro-batch as the step ran it: its autocast, random numbers and loss scale."""
    return diagnose(lambda: step.rerun(rerun), step.model)


def _fails(step: TrainStep, rerun: Rerun) -> bool:
    """Run a micro-batch as it is compiled."""
    with everything_kept(step.model):
        set_generators(rerun.random, step.device)
        loss = step.rerun(rerun)
        if is_bad(loss):
            return True
        loss.backward()
        return any(p.grad is not None and is_bad(p.grad) for p in step.model.parameters())


def _missing(bundle: Bundle) -> str:
    """Return what a bundle is without and what was taken instead, "" where it is whole."""
    if not bundle.left_out:
        return ""
    taken = f"; weights and buffers are those of {bundle.checkpoint or 'the start of the run'}"
    return f"the bundle is without {', '.join(bundle.left_out)}" + (taken if bundle.weights is None else "")


def _why_not(bundle: Bundle) -> str:
    if any(each.startswith("micro-batch") for each in bundle.left_out):
        return f"the batch is not whole: {', '.join(bundle.left_out)} could not be kept"
    if bundle.weights is None:
        where = f"a checkpoint ({bundle.checkpoint})" if bundle.checkpoint else "the start of the run"
        return f"the weights are those of {where}, not of that update; {_missing(bundle)}"
    if bundle.late:
        return "the weights may be those after the next update, for the verdict of a CUDA step is read a step later"
    if bundle.versions.get("torch") != str(torch.__version__):
        return f"it ran under torch {bundle.versions.get('torch')}, this is {torch.__version__}"
    return "the same numbers are finite now: look at the hardware (run it again on another GPU) or for a race"

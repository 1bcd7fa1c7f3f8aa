"""What a run does about a condemned step besides leaving it out: it keeps it, diagnoses it, and heals.

Each fault becomes a bundle under findings/ (diagnose/bundle.py), up to a number and a size. With `guard.on_fault: heal`
the step is diagnosed on the spot, on its own weights, batch and random numbers, and what cured the replay is applied:

    an island           the module computes in fp32 from now on; `precision` of the resolved recipe gets the rule
    another kernel      attention goes through the math kernel; `model.attention` becomes eager
    a lower loss scale  the loss is scaled so from now on, and the scale does not grow back; `train.loss_scale`
    a bad sample        its batch is left out when it comes again

and the run goes on from its last snapshot. What cannot be applied to a running model (the user's own line of code) is
told, and the batch is left out. Every cure is written to metrics.jsonl and, with its reason, to the resolved recipe.

Not covered: several ranks (bundles and diagnosis want whole weights), policies that cast the weights (an island would
change them under the optimizer): there the run goes back and leaves the batch out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from floatline.diagnose.bundle import bundle_of, save_bundle, write_finding
from floatline.diagnose.finding import Finding
from floatline.diagnose.replay import diagnose_rerun
from floatline.errors import BundleError, PrecisionError, RunDirectoryError
from floatline.step import Skip, TrainStep
from floatline.step.sentinel import Judged
from floatline.train.checkpoint import list_checkpoints
from floatline.train.rundir import RunDirectory

Say = Callable[[str], None]
MOST_BUNDLES = 5
MOST_DIAGNOSES = 5


@dataclass(frozen=True, kw_only=True)
class Cure:
    """What was changed so that a fault does not come again.

    Attributes:
        update: At which it came.
        kind: "island", "attention", "scale", "batch" (it is left out).
        key: Of the recipe, that was changed; "" for none.
        value: What it is now.
        reason: Why, as a sentence.
    """

    update: int
    kind: str
    key: str = ""
    value: str = ""
    reason: str


@dataclass
class Findings:
    """Keeps, diagnoses and heals the faults of one run.

    Args:
        rundir: Bundles go to its findings/.
        step: The step; its guard calls this.
        say: Tells the user.
        change_recipe: (key, value, reason): writes a choice into the resolved recipe.

    Attributes:
        cures: What was changed so far.
        leave_out: Whether the batch of the last fault is to be left out when it comes again: where nothing was healed.
    """

    rundir: RunDirectory
    step: TrainStep
    say: Say
    change_recipe: Callable[[str, Any, str], None]
    cures: list[Cure] = field(default_factory=list)
    leave_out: bool = True
    _bundles: int = 0
    _diagnoses: int = 0
    _changes: int = 0
    _scale: float | None = None  # the highest loss scale that does not overflow

    def attach(self) -> None:
        """Let the guard tell of faults, and a rollback when it is through. Of several ranks none keeps any."""
        if self.step.ranks.size == 1:
            self.step.sentinel.on_fault = self
            self.step.rollback.extras["findings"] = self

    def __call__(self, skip: Skip, judged: Judged) -> None:
        """Take a fault from the guard, before it goes back: on the weights that it happened on, or, where the verdict
        came late, on those after the next update."""
        path = self._keep(skip, judged)
        self.leave_out = True
        if self.step.guard.on_fault != "heal" or self._diagnoses >= MOST_DIAGNOSES:
            return
        self._diagnoses += 1
        finding = self._diagnose(skip, judged)
        if finding is not None:
            self._write(path, finding)
            self._heal(skip, judged, finding)

    def _write(self, path: Path | None, finding: Finding) -> None:
        try:
            if path is not None:
                write_finding(path, finding.as_dict())
        except RunDirectoryError as error:  # a full disk must not end the run
            self.say(error.message)

    def _keep(self, skip: Skip, judged: Judged) -> Path | None:
        if self._bundles >= MOST_BUNDLES or not judged.reruns:
            return None
        self._bundles += 1
        newest = list_checkpoints(self.rundir.checkpoints)
        checkpoint = str(newest[-1].relative_to(self.rundir.path)) if newest else ""
        try:
            path = save_bundle(bundle_of(self.step, skip, judged, checkpoint=checkpoint), self.rundir.path / "findings")
        except BundleError as error:  # a full disk must not end the run
            self.say(f"{error.message}")
            return None
        self.say(f"kept for diagnosis: floatline diagnose {path}")
        return path

    def _diagnose(self, skip: Skip, judged: Judged) -> Finding | None:
        """Diagnose the micro-batch at fault; what goes wrong in that must not end the run."""
        places = skip.micro_batches or range(len(judged.reruns))
        try:
            for place in places:
                with _scaled_as(self.step, judged):
                    finding = diagnose_rerun(self.step, judged.reruns[place])
                if finding is not None:
                    self.say(f"diagnosis of update {skip.step}: {finding.headline}")
                    return finding
        except Exception as error:  # of the user's own code, met by the diagnosis alone
            self.say(f"update {skip.step} could not be diagnosed: {type(error).__name__}: {error}".splitlines()[0])
            return None
        self.say(f"update {skip.step} is finite when it is run again; its batch is left out")
        return None

    def _heal(self, skip: Skip, judged: Judged, finding: Finding) -> None:
        tried = finding.counterfactual
        cure = None
        if tried is not None and tried.cured:
            if tried.kind == "island":
                cure = self._island(skip, finding, tried.module)
            elif tried.kind == "attention":
                cure = self._math_attention(skip, finding)
            elif tried.kind == "scale" and judged.scale is not None:
                cure = self._lower_scale(skip, finding, judged.scale * tried.scale)
        if cure is None:
            reason = f"{finding.cause}; {finding.remedy}"
            cure = Cure(update=skip.step, kind="batch", reason=reason)
        else:
            self.leave_out = False
        self.cures.append(cure)
        self.rundir.log({"kind": "cure", "step": skip.step, "what": cure.kind, "key": cure.key, "value": cure.value,
                         "reason": cure.reason, "finding": str(finding)})  # fmt: skip
        done = f"{cure.key} = {cure.value}" if cure.key else "the batch is left out"
        self.say(f"healed at update {skip.step}: {done}  ({cure.reason})")

    def _island(self, skip: Skip, finding: Finding, module: str) -> Cure | None:
        try:
            policy = self.step.add_island(module)
        except PrecisionError as error:
            self.say(f"{module} cannot become an island now: {error.message}")
            return None
        where = f" in {finding.module}" if finding.module else ""
        reason = f"at update {skip.step} {finding.cause}{where}; with {module} in fp32 the replay was finite"
        return self._changed(skip, "island", "precision", str(policy), reason)

    def _math_attention(self, skip: Skip, finding: Finding) -> Cure:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        reason = f"at update {skip.step} {finding.cause}; with the math kernel the replay was finite"
        return self._changed(skip, "attention", "model.attention", "eager", reason)

    def _lower_scale(self, skip: Skip, finding: Finding, scale: float) -> Cure:
        """It is set after the rollback, which puts the scale of the snapshot back."""
        self._scale = scale
        reason = f"at update {skip.step} {finding.cause}; at a loss scale of {scale:g} the replay was finite"
        return self._changed(skip, "scale", "train.loss_scale", scale, reason)

    def _changed(self, skip: Skip, kind: str, key: str, value: Any, reason: str) -> Cure:
        """Write a cure into the resolved recipe."""
        self.change_recipe(key, value, reason)
        self._changes += 1
        return Cure(update=skip.step, kind=kind, key=key, value=str(value), reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: what was found out stays known when a run goes back."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run has gone back, and has the loss scale of then again."""
        now = self.step.scaling.current()
        if self._scale is not None and now is not None and now > self._scale:
            self.step.scaling.set(self._scale)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "bundles": self._bundles,
            "diagnoses": self._diagnoses,
            "changes": self._changes,
            "scale": self._scale,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._bundles, self._diagnoses = state.get("bundles", 0), state.get("diagnoses", 0)
        self._changes, self._scale = state.get("changes", 0), state.get("scale")


@contextmanager
def _scaled_as(step: TrainStep, judged: Judged) -> Iterator[None]:
    """Give the step, inside, the loss scale that an update was run under: it has been halved since."""
    if judged.scale is None:
        yield
        return
    now = step.scaling.state_dict()
    try:
        step.scaling.set(judged.scale)
        yield
    finally:
        step.scaling.load_state_dict(now)

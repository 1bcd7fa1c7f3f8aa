"""What a diagnosis found: where, what, why, what to do, and whether doing it helped."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from floatline.observe.finite import Numbers, Place

PHASES = ("input", "parameter", "buffer", "forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The numbers that a finding rests on.

    Attributes:
        inputs: What went into the op.
        outputs: What came out.
        exact: What it would have been in a wider format (fp64), where that is known.
        saved: In the backward, what the forward op had kept.
        notes: Sentences: the distance to the format's limit, the line in the library, what made an input.
    """

    inputs: tuple[Numbers, ...] = ()
    outputs: tuple[Numbers, ...] = ()
    exact: tuple[Numbers, ...] = ()
    saved: tuple[Numbers, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"in   {item}" for item in self.inputs]
        lines += [f"kept {item}" for item in self.saved]
        lines += [f"out  {item}" for item in self.outputs]
        lines += [f"true {item}" for item in self.exact if not item.bad]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """The step run again with a remedy.

    Attributes:
        remedy: What was done, as a sentence.
        cured: Whether loss and gradients were finite then; None where it could not be tried.
        kind: "island", "wide", "edge", "row", "attention", "scale", "sample", or "" where nothing was tried.
        module: Of an island, the module.
        scale: What the loss was multiplied with.
        why: Why it could not be tried, or what happened.
    """

    remedy: str
    cured: bool | None
    kind: str = ""
    module: str = ""
    why: str = ""
    scale: float = 1.0

    def __str__(self) -> str:
        if not self.kind:
            return f"nothing: {self.why}"
        said = {True: "cured", False: "did not cure it", None: "not tried"}[self.cured]
        return f"{self.remedy}: {said}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The origin of what is not finite.

    Attributes:
        phase: "input", "parameter", "buffer", "forward", "backward" or "optimizer".
        op: Name of the aten op, without overload; for the backward the forward op whose derivative is at fault, of a
            user-written autograd Function its name. Of a bad input, the op that met it first; "" where no op did.
        module: Dotted name in the model, "" at the top.
        location: The user's line, with `.file`, `.line` and `.code`; None where no line of theirs was on the stack.
        cause: What went wrong, one sentence.
        cause_name: The cause's name in the table, "overflow", "log of zero" ...
        evidence: The numbers.
        remedy: What to change, one sentence.
        tried: What became of the step with each remedy that was tried, in that order.
        tensor: Of a bad input, parameter or buffer, its name; in the optimizer phase the parameter's.
        samples: Indices along dimension 0 of the bad input, or of the batch where the bad values lie.
    """

    phase: str
    op: str
    module: str
    location: Place | None
    cause: str
    cause_name: str
    evidence: Evidence
    remedy: str
    tried: tuple[Counterfactual, ...] = ()
    tensor: str = ""
    samples: tuple[int, ...] = ()

    @property
    def headline(self) -> str:
        """Phase, op, module and cause in one line."""
        return f"{self.phase}: {self._where}: {self.cause}" if self._where else f"{self.phase}: {self.cause}"

    @property
    def _where(self) -> str:
        return " of ".join(filter(None, (self.op, self.module)))

    @property
    def counterfactual(self) -> Counterfactual | None:
        """What cured the replay, else the last that did not, else why none was tried; None if not asked for."""
        order = {True: 2, False: 1, None: 0}
        return max(reversed(self.tried), key=lambda tried: order[tried.cured], default=None)

    def __str__(self) -> str:
        lines = [f"{self.phase}: " + (", ".join(filter(None, (self._where, self.tensor))) or "the loss")]
        lines += [f"  at      {self.location}"] if self.location else []
        lines += [f"  samples {', '.join(map(str, self.samples[:8]))}"] if self.samples else []
        lines += [f"  cause   {self.cause}"]
        lines += ["  " + line for line in str(self.evidence).splitlines()]
        lines += [f"  remedy  {self.remedy}"]
        lines += [f"  tried   {tried}" for tried in self.tried]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

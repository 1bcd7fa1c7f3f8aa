"""Audit a function in one lower format: read every op, search for the lines that must be fp32, try them jointly.

1. The function with everything lowered. A line that raises there (no kernel, a tensor of another format) is run in
   fp32.
2. A meter on all ops: lines with an op that fails by itself become fp32, also where this host's kernels hide it or
   these inputs forgive it.
3. If the outputs are not within the tolerance then, the search looks for the cheapest lines that bring them there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from floatline.audit.fp32_lines import BUILT_IN, Line
from floatline.audit.function_report import FunctionCandidate, FunctionEffect, OutputError
from floatline.audit.judging import FLIPPED, Judged, judge, suspicion
from floatline.audit.modules import SMALL
from floatline.audit.outputs import output_error
from floatline.audit.program import Format, Program, Result
from floatline.audit.report import Row
from floatline.audit.rows import op_row
from floatline.audit.search import search
from floatline.audit.trials import Item, Outcome
from floatline.hardware import Hardware, format_verdict
from floatline.observe.error import Reading
from floatline.observe.finite.places import Place, place_of_error


class LineLowering:
    """The audit of a function in one format.

    Args:
        program: The function and its inputs.
        truth: What it gives in fp32 and in fp64.
        fp32: Error of fp32 itself.
        fmt: The format.
        allowed: Largest relative error of an output.
        random: It draws random numbers: each run is held against its own exact values.

    Attributes:
        name: "bf16" or "fp16".
        on_cuda: It ran on a GPU.
        judged: Every op with its judgement, after `run`.
    """

    def __init__(
        self,
        program: Program,
        truth: Result,
        fp32: Sequence[OutputError],
        fmt: Format,
        allowed: float,
        random: bool,
    ) -> None:
        self.name = fmt.name
        self.on_cuda = program.device.type == "cuda"
        self.judged: tuple[tuple[Reading, Judged], ...] = ()
        self._program = program
        self._truth = truth
        self._judged_outputs = {error.name for error in fp32 if computed(error, allowed)}
        self._format = fmt
        self._allowed = allowed
        self._random = random
        self._known: dict[frozenset[Line], FunctionEffect] = {}
        self._raised: dict[frozenset[Line], tuple[Line, str]] = {}
        self._places: dict[Line, Place] = {}
        self._numbers: dict[str, Line] = {}

    def run(self, target: Hardware) -> FunctionCandidate:
        """Do it."""
        no_kernel = self._lines_without_kernel()
        forced = frozenset(no_kernel)
        lowered = self.effect(forced)
        if not lowered.error:
            result = self._program.read(self._format, forced or None, lowered.scale)
            self.judged = tuple((reading, judge(reading)) for reading in result.readings)
        items = self._items()
        chosen, reason = self._search(items, forced, lowered)
        legal = format_verdict(target, self.name)
        return FunctionCandidate(
            name=self.name,
            all_lowered=lowered,
            lines=None if chosen is None else tuple(self._place(line) for line in sorted(chosen)),
            effect=None if chosen is None else self.effect(chosen),
            no_kernel={f"{file}:{line}": why for (file, line), why in no_kernel.items()},
            safe_outputs=tuple(e.name for e in lowered.outputs if self._ratio(e) <= 1),
            audited=len(forced | set(self._numbers.values())),
            trials=tuple(self._known.values()),
            reason=reason,
            illegal="" if legal else legal.reason,
        )

    def rows(self, candidate: FunctionCandidate) -> list[Row]:
        """Return a row for each op."""
        kept = {(place.file, place.line) for place in candidate.lines or ()}
        return [
            replace(
                op_row(self.name, reading, judged, kept=_line(reading) in kept),
                module="",
                location=reading.spot.library or reading.spot.user,
            )
            for reading, judged in self.judged
        ]

    def effect(self, lines: frozenset[Line]) -> FunctionEffect:
        """Return what a choice of lines comes to; each is run once."""
        if lines not in self._known:
            self._known[lines] = self._run(lines)
        return self._known[lines]

    def _run(self, lines: frozenset[Line]) -> FunctionEffect:
        names = tuple(sorted(lines))
        try:
            result = self._program.run(self._format, lines or None, shadows=self._random)
        except Exception as error:  # a choice that does not run is one that is not safe
            self._raised[lines] = self._line_of(error), f"{type(error).__name__}: {error}".splitlines()[0]
            return FunctionEffect(lines=names, outputs=(), ratio=math.inf, error=self._raised[lines][1])
        exact = result.exact if self._random else self._truth.exact
        if result.values.keys() != exact.keys():
            return FunctionEffect(
                lines=names, outputs=(), ratio=math.inf, error="it returns other outputs than in fp32"
            )
        errors = tuple(output_error(name, value, exact[name]) for name, value in result.values.items())
        ratio = max(map(self._ratio, errors), default=0.0)
        return FunctionEffect(lines=names, outputs=errors, ratio=ratio, scale=result.scale)

    def _line_of(self, error: Exception) -> Line:
        place = place_of_error(error)
        if place is None:
            return BUILT_IN
        self._places[place.file, place.line] = place
        return place.file, place.line

    def _ratio(self, error: OutputError) -> float:
        """Return an output's error in units of what is allowed; 0 for one that fp32 does not compute."""
        if error.name not in self._judged_outputs:
            return 0.0
        return error.flipped / error.decisions / FLIPPED if error.decisions else error.relative / self._allowed

    def _lines_without_kernel(self) -> dict[Line, str]:
        """Return lines that raise in the format, each with what it raises."""
        found: dict[Line, str] = {}
        while self.effect(frozenset(found)).error:
            line, why = self._raised.get(frozenset(found), (BUILT_IN, ""))
            if line in found or not why:  # fp32 does not help there
                break
            found[line] = why
        return found

    def _items(self) -> list[Item]:
        """Return the lines that have to do with the format, with what fp32 costs there."""
        costs: dict[Line, float] = defaultdict(float)
        doubts: dict[Line, float] = defaultdict(float)
        for reading, judged in self.judged:
            line = _line(reading)
            place = reading.spot.library or reading.spot.user
            if place is not None:
                self._places.setdefault(line, place)
            costs[line] += reading.flops + (reading.calls * reading.measure.numel if reading.measure else 0)
            doubts[line] = max(doubts[line], suspicion(reading, judged))
        total = sum(costs.values()) or 1.0
        self._numbers = {str(number): line for number, line in enumerate(sorted(costs))}
        return [
            Item(name=number, cost=costs[line] / total + SMALL, suspicion=doubts[line])
            for number, line in self._numbers.items()
        ]

    def _search(
        self, items: Sequence[Item], forced: frozenset[Line], lowered: FunctionEffect
    ) -> tuple[frozenset[Line] | None, str]:
        failing = frozenset(_line(reading) for reading, judged in self.judged if judged.failure is not None)
        fixed = forced | failing
        if not fixed and lowered.ratio <= 1:
            return fixed, f"with everything in {self.name} all outputs are within the tolerance"
        if lowered.error:
            return None, f"it does not run in {self.name}, also not with lines in fp32: {lowered.error}"

        def evaluate(names: frozenset[str]) -> Outcome:
            effect = self.effect(fixed | {self._numbers[name] for name in names})
            return Outcome(passes=effect.ratio <= 1, error=effect.ratio)

        found = search([item for item in items if self._numbers[item.name] not in fixed], evaluate)
        by_itself = f"{len(failing)} of {len(items)} lines fail by themselves" if failing else "no line fails by itself"
        if forced:
            by_itself += f", {len(forced)} do not run in {self.name} here"
        if found.islands is None:
            return None, f"{by_itself}; not even with all lines in fp32 are the outputs within the tolerance"
        if not found.islands:
            return fixed, f"{by_itself}; with those in fp32 all outputs are within the tolerance"
        return fixed | {self._numbers[name] for name in found.islands}, f"{by_itself}; {found.reason}"

    def _place(self, line: Line) -> Place:
        return self._places.get(line) or Place(line[0], line[1], "", self._program.name)


def _line(reading: Reading) -> Line:
    return reading.spot.line or BUILT_IN


def computed(fp32: OutputError, allowed: float) -> bool:
    """Say whether fp32 computes an output within the tolerance."""
    return fp32.relative <= allowed and fp32.flipped <= FLIPPED * fp32.decisions

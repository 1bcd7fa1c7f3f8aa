"""What an audit says in words: the policy of all candidates, the paragraph, what no policy can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from floatline.audit.judging import percent
from floatline.audit.lowered import Lowered
from floatline.audit.report import Candidate, Row
from floatline.audit.tolerance import Effect, Tolerance
from floatline.audit.update_report import UpdateReport


def choose(candidates: Mapping[str, Candidate]) -> str:
    """Return the policy with the fewest FLOPs in fp32 that the target runs, the earlier one of equals; else fp32."""
    usable = [c for c in candidates.values() if c.policy is not None and not c.illegal]
    if not usable:
        return "32-true"
    return str(min(usable, key=lambda c: (len(c.islands) > 0, c.cost)).policy)


def verdict(
    policy: str, candidates: Mapping[str, Candidate], modules: int, rows: Sequence[Row], allowed: Tolerance
) -> str:
    """Return one paragraph: a sentence for each candidate, then the choice."""
    sentences = [_of(candidate, modules, rows, allowed) for candidate in candidates.values()]
    if policy == "32-true":
        sentences.append("Stay in fp32: 32-true.")
    else:
        sentences.append(f"Use {policy}.")
    return " ".join(sentences)


def _of(candidate: Candidate, modules: int, rows: Sequence[Row], allowed: Tolerance) -> str:
    failing = sum(row.candidate == candidate.name and row.failure is not None for row in rows)
    lowered, effect = candidate.all_lowered, candidate.effect
    if not candidate.trials:
        text = f"{candidate.base} does not run: {candidate.reason}"
    elif candidate.policy is None:
        text = f"{candidate.base} is not safe, with whatever islands: {candidate.reason}"
    elif not candidate.islands and not failing:
        text = f"{candidate.base} is safe as it is: {_within(lowered)} of fp64"
    elif not candidate.islands:
        text = f"{candidate.base} is within the tolerance, but {failing} ops outside of modules fail (see the advice)"
    elif candidate.raising:
        assert effect is not None
        text = f"{candidate.base} needs {len(candidate.islands)} of {modules} modules in fp32, for "
        text += f"{', '.join(candidate.raising)} raises in {candidate.name}: {_within(effect)} of fp64 with them"
    else:
        assert effect is not None
        text = f"{candidate.base} needs {len(candidate.islands)} of {modules} modules in fp32: "
        text += _before_and_after(lowered, effect, allowed)
    if candidate.illegal:
        text += f"; the target does not run it: {candidate.illegal}"
    return text + "."


def _within(effect: Effect) -> str:
    if not effect.gradient_error:  # the forward alone
        return f"outputs within {percent(effect.loss_error)}"
    return f"loss within {percent(effect.loss_error)}, gradient within {percent(effect.gradient_error)}"


def _before_and_after(before: Effect, after: Effect, allowed: Tolerance) -> str:
    """Say what the islands do to the error that is furthest outside of the tolerance without them."""
    errors = {"loss_error": allowed.loss, "gradient_error": allowed.gradient, "tensor_error": allowed.tensor}
    worst = max(errors, key=lambda name: getattr(before, name) / errors[name])
    if not after.gradient_error:
        what = "the outputs' error"
    elif worst == "tensor_error":
        what = f"the error of {before.tensor}'s gradient"
    else:
        what = f"the {worst.removesuffix('_error')}'s error"
    without = percent(getattr(before, worst)) if before.finite else "not finite"
    now = f"at most {percent(after.tensor_error)}" if worst == "tensor_error" else percent(getattr(after, worst))
    return f"{what} is {without} without and {now} with them"


def advice_of(low: Lowered, updates: UpdateReport | None) -> tuple[str, ...]:
    """Return what no policy can do: code outside of modules, the optimizer."""
    found = [f"{module} raises in {low.name}: {said}; it is kept in fp32" for module, said in low.raising.items()]
    for reading, judged in low.judged:
        if judged.failure is not None and reading.spot.module not in (low.islands or ()) and reading.spot.module == "":
            place = reading.spot.user
            where = f"{place.file}:{place.line}" if place is not None else "the top of the model"
            found.append(
                f"{reading.spot.op} at {where} is in no module that a policy can name: compute it in fp32 (x.float()), "
                f"for {judged.why}"
            )
    if low.policy is None and low.base.endswith("-true"):
        names = ", ".join(sorted(low.flagged)) or "what fails"
        found.append(
            f"cast weights round between modules, so no island helps {names}: audit mode='mixed', or "
            "pass what needs the bits as integers and compute it in fp32 inside"
        )
    if updates is not None and updates.advice:
        found.append(updates.advice)
    return tuple(dict.fromkeys(found))

"""`memory: auto`: plan before training, then train with what the plan chose.

    floatline train recipe.yaml memory=auto hardware=t4
    floatline train recipe.yaml memory=exact techniques.offload=false

With `exact` only techniques that leave the numbers of training as they are, to rounding; one that the recipe sets to
false is not used.

The plan's techniques join the recipe's own as automatic choices, each with what it saves; how the batch is cut becomes
`train.micro_batch_size`. In the resolved recipe `memory` is null, for the choice is made: it runs the same again, and a
run that goes on keeps what its first start chose. The whole plan is in `plan.json` of the run directory.

A run that only may fit ("tight") is started, and told so. One that does not fit with anything is not: what would fit
is the error's hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from floatline.errors import MemoryExceededError
from floatline.plan.plan import Plan
from floatline.techniques import Technique, make_technique
from floatline.train.data import Sample, SampleEncoder
from floatline.train.plan_recipe import RecipeWork, plan_apart, plan_recipe, workload_of
from floatline.train.recipe import Recipe, parse_recipe
from floatline.train.resolve import AutomaticChoice
from floatline.train.rundir import RunDirectory
from floatline.train.techniques import write_techniques

FILE = "plan.json"


def choose_techniques(
    recipe: Recipe,
    encoder: SampleEncoder,
    samples: Sequence[Sample],
    ranks: int,
    rundir: RunDirectory,
    say: Callable[[str], None],
) -> tuple[Recipe, list[AutomaticChoice]]:
    """Plan a recipe, write plan.json, and return the recipe with the plan's techniques and the choices made.

    Args:
        recipe: With `memory: auto`; its sizes were checked.
        encoder: Of the samples.
        samples: The training data.
        ranks: How many processes train together.
        rundir: Where plan.json goes.
        say: Shows what is tried.

    Raises:
        MemoryExceededError: The run does not fit with any techniques; plan.json is written all the same.
        ModelError: The model cannot run without values.
    """
    asked = workload_of(recipe, ranks=ranks, encoder=encoder, samples=samples)
    say(f"memory=auto: planning for {asked.hardware.name} with the largest of the training data")
    planning = plan_apart if asked.sharded else plan_recipe
    plan = planning(asked, lambda what, done: say(f"  {done + 1}: {what}"))
    rundir.write_json(FILE, {**plan.as_dict(), "samples": asked.rows, "ranks": ranks})
    if plan.verdict == "does not fit":
        raise _does_not_fit(plan)
    return _with_plan(recipe, asked, plan)


def forget_plan(rundir: RunDirectory) -> None:
    """Remove the plan of an earlier start that came to nothing."""
    (rundir.path / FILE).unlink(missing_ok=True)


def _with_plan(recipe: Recipe, asked: RecipeWork, plan: Plan) -> tuple[Recipe, list[AutomaticChoice]]:
    """Merge the plan's techniques into the recipe."""
    known = {technique.name for technique in asked.techniques}
    added = [t for t in map(make_technique, plan.techniques) if t.name not in known]
    tree = recipe.model_dump(mode="json")
    tree["memory"] = None
    choices = [AutomaticChoice("memory", None, summary(plan))]
    for technique in added:
        choice = _choice(technique, plan, asked)
        section, name = choice.key.split(".")
        tree[section][name] = choice.value
        choices.append(choice)
    return parse_recipe(tree, "planned recipe"), choices


def _choice(technique: Technique, plan: Plan, asked: RecipeWork) -> AutomaticChoice:
    if technique.name != "accumulation":
        rung = next(r for r in reversed(plan.ladder) if r.kept and make_technique(r.added).name == technique.name)
        reason = f"the plan needs it: it takes {size(rung.saved)} off the peak"
        return AutomaticChoice(f"techniques.{technique.name}", write_techniques([technique])[technique.name], reason)
    parts: Any = getattr(technique, "micro_batches", 1)
    reason = f"{parts} micro-batches of {asked.rows} samples, the fewest with which the plan fits"
    if "packing" in asked.recipe.used:
        return AutomaticChoice("techniques.accumulation", write_techniques([technique])["accumulation"], reason)
    return AutomaticChoice("train.micro_batch_size", -(-asked.rows // parts), reason)


def summary(plan: Plan) -> str:
    """Return the verdict in a sentence."""
    capacity = size(plan.estimate.fit.capacity)
    text = f"planned for {plan.hardware.name}: {plan.verdict}, {size(plan.estimate.fit.needed)} of {capacity}"
    if plan.verdict == "tight":
        text += f", chance {plan.estimate.fit.chance:.0%}"
    bottom = plan.ladder[0].estimate
    if len(plan.techniques) > len(bottom.techniques):
        text += f"; {size(bottom.fit.needed)} without what the plan adds"
    return text


def _does_not_fit(plan: Plan) -> MemoryExceededError:
    least = min(rung.estimate.fit.needed for rung in plan.ladder)
    used = ", ".join(make_technique(text).name for text in plan.techniques) or "no technique"
    return MemoryExceededError(
        f"{plan.probe.model} in {plan.precision} needs {size(least)} on {plan.hardware.name}, which has "
        f"{size(plan.estimate.fit.capacity)}, with all that saves memory there ({used})",
        hint="; or ".join(f"it would fit with {piece.text}" for piece in plan.advice)
        or f"make the samples smaller (data.max_pixels, shorter texts); {FILE} in the run directory says what takes it",
    )


def size(nbytes: int) -> str:
    """Return bytes as people read them.

    >>> size(3 * 2**30), size(5 * 2**20)
    ('3.00 GiB', '5 MiB')
    """
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"

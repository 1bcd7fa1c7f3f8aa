"""`floatline plan recipe.yaml`: the report on a recipe's run, as the command gives it for a model.

What is trained, on which batch and in which precision is the recipe's; the command's options for shapes have no place
beside it. The largest sizes are not looked for: they are what the data holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from floatline.errors import ConfigError
from floatline.plan.command import PlanReport, PlanRequest, settings_of
from floatline.plan.export import not_expressible
from floatline.plan.plan import Progress
from floatline.plan.shape import Shape
from floatline.plan.sources import Source
from floatline.plan.table import component_table
from floatline.plan.traces import TraceCache
from floatline.train.plan_recipe import RecipeWork, plan_recipe, workload_of
from floatline.train.recipe import load_recipe


def report_on_recipe(request: PlanRequest, overrides: list[str], progress: Progress) -> PlanReport:
    """Plan the run of a recipe.

    Args:
        request: Its `model` is the recipe's path.
        overrides: Changes to the recipe, `key=value`.
        progress: Called before each trial.

    Raises:
        ConfigError: An option that the recipe decides, or anything wrong in the recipe.
        DataError: A sample that cannot be used.
        ModelError: The model cannot be read or run without values.
    """
    _refuse(request)
    here = [] if request.hardware == "auto" else [f"hardware={request.hardware}"]
    asked = workload_of(load_recipe(Path(request.model), [*here, *overrides]))
    work = asked.work
    traces = TraceCache(work)
    decided = plan_recipe(
        asked,
        progress,
        exclude=request.exclude,
        exact=request.exact,
        allocator=request.allocator,
        advice=not request.quick,
        traces=traces,
    )
    quick = request.quick or asked.sharded
    return PlanReport(
        source=_source_of(request.model, asked),
        hardware=asked.hardware,
        estimate=decided.estimate,
        precision_reason=decided.precision_reason,
        plan=decided,
        table={}
        if quick
        else component_table(work, asked.hardware, progress, allocator=request.allocator, traces=traces),
        settings=settings_of(decided),
        gaps=not_expressible(decided),
    )


def _refuse(request: PlanRequest) -> None:
    given = {"--batch": request.batch, "--global-batch": request.global_batch, "--task": request.task,
             "--technique": request.techniques, "--vram": request.vram, "--capability": request.capability,
             "--precision": request.precision != "auto", "a size": request.shape != Shape(),
             "--mode": request.mode != "train", "--hardware all": request.hardware == "all"}  # fmt: skip
    for option in (option for option, value in given.items() if value):
        raise ConfigError(
            f"{option} was given, but {request.model} is a recipe, which decides that itself",
            hint="change the recipe by key=value, e.g. train.batch_size=16 precision=32-true techniques.lora=true",
        )


def _source_of(path: str, asked: RecipeWork) -> Source:
    def no_other_shape(shape: Shape) -> NoReturn:
        raise ConfigError("the sizes of a recipe's batches are its data's", hint="change data or train.batch_size")

    return Source(
        name=Path(path).stem,
        kind="module",
        work=asked.work,
        shape=Shape(batch=asked.rows),
        origin=path,
        notes=("the batch is the largest one that the training data can give",),
        lay_out=no_other_shape,
        count=lambda: None,
    )

"""`floatline audit recipe.yaml`: what must stay fp32 when this recipe trains.

The model with its weights, batches of its training data, encoded and collated as in training, its optimizer and
learning rate, its hardware. Techniques that decide what learns (freezing, lora) are put on. The others are left out:
they do not change the arithmetic, or change it in ways that are their own (chunked loss, compiled code).

Batches are drawn by the recipe's seed, as many rows as one forward of its training has.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from floatline.audit.command import AuditRequest, audit_source
from floatline.audit.progress import Progress
from floatline.audit.report import AuditReport
from floatline.audit.sources import AuditSource
from floatline.errors import ConfigError
from floatline.hardware import resolve as resolve_hardware
from floatline.plan.shape import Shape
from floatline.techniques import Stage
from floatline.train.data import Sample, SampleEncoder, load_samples
from floatline.train.hub import load_model
from floatline.train.optimizers import RIVALS
from floatline.train.parts import collator_of, encoder_of, optimizer_of
from floatline.train.recipe import Recipe, load_recipe


def audit_recipe(
    request: AuditRequest, overrides: list[str], progress: Progress = lambda what, done: None
) -> AuditReport:
    """Audit the step of a recipe.

    Args:
        request: Its `model` is the recipe's path; an open mode is that of the recipe's precision.
        overrides: Changes to the recipe, `key=value`.
        progress: Called before each forward pass.

    Raises:
        ConfigError: An option that the recipe decides, or anything wrong in the recipe.
        DataError: A sample that cannot be used.
        ModelError: The model cannot be loaded or audited.
    """
    _refuse(request)
    here = [] if request.hardware == "auto" else [f"hardware={request.hardware}"]
    recipe = load_recipe(Path(request.model), [*here, *overrides])
    progress("reading the data", 0)
    encoder = encoder_of(recipe)
    data = recipe.data
    samples = load_samples(
        data.train, encoder=encoder, max_pixels=data.max_pixels, on_bad_sample=data.on_bad_sample
    ).good
    progress("loading the model", 0)
    source = _source_of(request, recipe, encoder, samples)
    asked = replace(
        request,
        mode=request.mode or mode_of(recipe.precision),
        hardware=recipe.hardware,
        seed=request.seed or recipe.train.seed % 2**31,
    )
    return audit_source(asked, source, progress)


def mode_of(precision: str) -> str:
    """Return the mode in which a recipe's precision trains; fp32 and `auto` would go to autocast.

    >>> mode_of("bf16-true; lm_head=32"), mode_of("auto"), mode_of("32-true")
    ('true', 'mixed', 'mixed')
    """
    return "true" if precision.split(";")[0].strip() in ("bf16-true", "16-true") else "mixed"


def _refuse(request: AuditRequest) -> None:
    given = {"a size": request.shape != Shape(), "--task": request.task, "--optimizer": request.optimizer,
             "--lr": request.lr}  # fmt: skip
    for option in (option for option, value in given.items() if value):
        raise ConfigError(
            f"{option} was given, but {request.model} is a recipe, which decides that itself",
            hint="change the recipe by key=value, e.g. train.micro_batch_size=4 train.lr=1e-5",
        )


def _source_of(request: AuditRequest, recipe: Recipe, encoder: SampleEncoder, samples: list[Sample]) -> AuditSource:
    rows = min(rows_of(recipe), len(samples))
    batches = draw_batches(encoder, samples, rows, request.batches, recipe.train.seed)
    model = load_model(recipe.model.path, "fp32", recipe.model.attention)
    told = _make_learnable(model, recipe)
    notes = [f"{len(batches)} batch{'es' * (len(batches) > 1)} of {rows} samples from {recipe.data.train}", *told]
    return AuditSource(
        name=Path(request.model).stem,
        model=model,
        batch=batches,
        optimizer=optimizer_of(recipe.train) if request.backward else None,
        notes=tuple(notes),
    )


def rows_of(recipe: Recipe) -> int:
    """Return how many samples one forward of the recipe's training has."""
    parts = recipe.used.get("accumulation", {}).get("micro_batches", 1)
    return recipe.train.micro_batch_size or -(-recipe.train.batch_size // parts)


def draw_batches(encoder: SampleEncoder, samples: list[Sample], rows: int, count: int, seed: int) -> list[Any]:
    """Return batches of training data, collated; no sample is in two of them while the data last.

    Args:
        encoder: Of the samples.
        samples: Those that can be used.
        rows: Samples a batch.
        count: Batches.
        seed: Of the draw.
    """
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    picked = [[order[place % len(order)] for place in range(at * rows, (at + 1) * rows)] for at in range(count)]
    collate = collator_of(encoder)
    return [collate([encoder.encode(samples[place]) for place in places]) for places in picked]


def _make_learnable(model: nn.Module, recipe: Recipe) -> list[str]:
    """Put on the techniques that decide what learns; say which others are left out, and what that means."""
    left_out = []
    for technique in recipe.make_techniques():
        if technique.stage in (Stage.FREEZE, Stage.ADAPT):
            technique.apply(model, resolve_hardware(recipe.hardware))
        else:
            left_out.append(technique.name)
    notes = [f"left out of the audit: {', '.join(left_out)}"] if left_out else []
    keeps = [name for name in left_out if name in RIVALS]
    if keeps:
        notes.append(f"updates are those of AdamW as it is; the recipe's {keeps[0]} keeps what rounding takes away")
    return notes

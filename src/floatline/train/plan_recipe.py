"""Plan a recipe: the workload that training from it would run, and everything the recipe has fixed.

    asked = workload_of(load_recipe("recipe.yaml", ["hardware=t4"]))
    plan = plan_recipe(asked)

The model is built from its config on fake tensors, in the format and with the attention that the recipe asks for;
weights are not read. The batch is real: the largest update of the training data (data/largest.py), encoded and collated
as in training. Optimizer, precision, clipping and the recipe's own techniques are the run's.

The recipe may have decided how a batch is cut (`train.micro_batch_size`, accumulation, a budget of tokens). Then it is
cut that way here, the largest micro-batch first, and the plan does not cut it otherwise.

Not covered: evaluation and generation. They need no gradients and no more than the trained model and its cache of keys
and values, but a long `data.max_answer_tokens` with a large `eval.batch_size` may need more than a training step.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from floatline.errors import FloatlineError
from floatline.hardware import Hardware
from floatline.hardware import resolve as resolve_hardware
from floatline.plan.building import model_factory
from floatline.plan.plan import Plan, Progress, plan
from floatline.precision.islands import DTYPES
from floatline.step import Workload
from floatline.techniques import Technique, fake_ranks
from floatline.techniques.batches.buckets import cut_by_tokens
from floatline.train.data import Sample, SampleEncoder, load_samples
from floatline.train.data.largest import largest_update, sizes_of
from floatline.train.hub import describe_model
from floatline.train.parts import collator_of, encoder_of, optimizer_of
from floatline.train.recipe import Recipe
from floatline.train.resolve import resolve_recipe


@dataclass(frozen=True, kw_only=True)
class RecipeWork:
    """What a recipe asks a planner.

    Attributes:
        recipe: Without gaps.
        hardware: The device.
        precision: The policy, as its string.
        techniques: Those that the recipe has fixed.
        exclude: Names of techniques that the recipe leaves no room for.
        max_grad_norm: As for `TrainStep`.
        batch: The largest update of one rank: a batch, or a list of micro-batches where the recipe cuts it.
        rows: Samples of it.
        ranks: How many processes train together.
    """

    recipe: Recipe
    hardware: Hardware
    precision: str
    techniques: tuple[Technique, ...]
    exclude: tuple[str, ...]
    max_grad_norm: float | None
    batch: Any
    rows: int
    ranks: int = 1

    @property
    def work(self) -> Workload:
        """The workload, its model as a factory.

        Raises:
            ModelError: The model's directory cannot be read.
        """
        section = self.recipe.model
        cls, config = describe_model(section.path)
        dtype = DTYPES[section.dtype or "fp32"]
        return Workload(
            model=model_factory(cls, config, dtype, attention=section.attention, cache=True),
            batch=lambda: self.batch,
            optimizer=optimizer_of(self.recipe.train),
        )

    @property
    def sharded(self) -> bool:
        """Whether the ranks share the model out."""
        return any(technique.name == "sharding" for technique in self.techniques)


def workload_of(
    recipe: Recipe,
    *,
    ranks: int = 1,
    encoder: SampleEncoder | None = None,
    samples: Sequence[Sample] | None = None,
) -> RecipeWork:
    """Return what training from a recipe would run, for a planner.

    Args:
        recipe: As the user wrote it.
        ranks: How many processes train together.
        encoder: Of the samples; None makes it.
        samples: The training data; None reads them.

    Raises:
        ConfigError: Sizes that do not fit together.
        DataError: A sample that cannot be used.
        ModelError: The model's directory cannot be read.
    """
    encoder = encoder or encoder_of(recipe)
    if samples is None:
        data = recipe.data
        samples = load_samples(
            data.train, encoder=encoder, max_pixels=data.max_pixels, on_bad_sample=data.on_bad_sample
        ).good
    resolved = resolve_recipe(recipe, train_samples=len(samples))
    cut = decides_cut(recipe)
    fixed = [t for t in recipe.make_techniques() if t.name != "accumulation" or "packing" in recipe.used]
    rows = recipe.train.batch_size // ranks
    return RecipeWork(
        recipe=resolved.recipe,
        hardware=resolve_hardware(recipe.hardware),
        precision=str(resolved.policy),
        techniques=tuple(fixed),
        exclude=(*recipe.left_out, *(("accumulation",) if cut else ())),
        max_grad_norm=recipe.train.max_grad_norm,
        batch=_largest_batch(resolved.recipe, encoder, samples, rows, cut),
        rows=rows,
        ranks=ranks,
    )


def decides_cut(recipe: Recipe) -> bool:
    """Say whether a recipe decides itself how a batch is cut into micro-batches.

    Packed rows are cut by the step; there accumulation is a technique like others.
    """
    techniques = recipe.used
    if "packing" in techniques:
        return False
    budget = techniques.get("batching", {}).get("max_tokens")
    return bool(recipe.train.micro_batch_size or budget or "accumulation" in techniques)


def _largest_batch(recipe: Recipe, encoder: SampleEncoder, samples: Sequence[Sample], rows: int, cut: bool) -> Any:
    """Return the largest update as the loader would hand it out, but the largest micro-batch first."""
    lengths, images = sizes_of(samples, encoder)
    budget = recipe.used.get("batching", {}).get("max_tokens")
    order = largest_update(lengths, images, rows, by_tokens=bool(budget) or "packing" in recipe.used)
    size = (recipe.train.micro_batch_size or rows) if cut and not budget else rows
    groups = (
        cut_by_tokens(order, lengths, budget)
        if budget
        else [order[at : at + size] for at in range(0, len(order), size)]
    )
    collate = collator_of(encoder)
    batches = [collate([encoder.encode(samples[at]) for at in group]) for group in groups]
    return batches if len(batches) > 1 else batches[0]


def plan_recipe(asked: RecipeWork, progress: Progress = lambda what, done: None, **settings: Any) -> Plan:
    """Plan what a recipe asks for.

    Args:
        asked: As `workload_of` returns it.
        progress: Called before each trial with what is tried and how many are done.
        settings: Further arguments of `floatline.plan.plan.plan`.

    Raises:
        ConfigError: Fixed choices that exclude each other.
        ModelError: The model cannot run without values.
    """
    given = {
        "precision": asked.precision,
        "techniques": asked.techniques,
        "max_grad_norm": asked.max_grad_norm,
        **settings,
        "exclude": (*asked.exclude, *settings.get("exclude", ())),
        "exact": asked.recipe.memory == "exact" or settings.get("exact", False),
    }
    with fake_ranks(asked.ranks) if asked.sharded else nullcontext():
        return plan(asked.work, asked.hardware, progress=progress, **given)


def plan_apart(asked: RecipeWork, progress: Progress = lambda what, done: None) -> Plan:
    """Plan in a process of its own: one that has joined its ranks cannot pretend to be another's.

    Raises:
        FloatlineError: As `plan_recipe`.
    """
    line = [sys.executable, "-c", "from floatline.train.plan_recipe import _answer; _answer()"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        with child.stdin as pipe:
            pickle.dump(asked, pipe)
        answer: Any = None
        while child.poll() is None or answer is None:
            try:
                answer = pickle.load(child.stdout)
            except EOFError:
                break
            if isinstance(answer, tuple):
                progress(*answer)
    if isinstance(answer, FloatlineError):
        raise answer
    if not isinstance(answer, Plan):
        raise RuntimeError(f"the planning process ended with code {child.returncode} and no plan; see its error above")
    return answer


def _answer() -> None:
    """The process that plans: reads what is asked from stdin, writes its progress and then the plan to stdout."""
    out = sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may write there

    def tell(value: Any) -> None:
        pickle.dump(value, out)
        out.flush()

    asked: RecipeWork = pickle.load(sys.stdin.buffer)
    try:
        tell(plan_recipe(asked, lambda what, done: tell((what, done))))
    except FloatlineError as error:
        tell(error)

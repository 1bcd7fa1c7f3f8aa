"""From a recipe to a run that is ready to go, new or resumed.

The order is chosen so that a mistake costs nothing: recipe, hardware and precision, data (every sample is checked), and
only then the model. Nothing in a run directory is overwritten before it is known to be this run's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floatline.errors import CheckpointError
from floatline.hardware import resolve as resolve_hardware
from floatline.precision import Policy
from floatline.precision import resolve as resolve_precision
from floatline.step import Guard, TrainStep
from floatline.step.soundness import not_finite
from floatline.techniques import OneRank, Stack
from floatline.train import rng
from floatline.train.adapter_weights import AdapterWeights, make_weights
from floatline.train.checkpoint import (
    checkpoint_path,
    find_fault,
    newest_sound,
    set_damaged_aside,
    step_of,
)
from floatline.train.data import Sample, SampleDataset, SampleEncoder, load_samples, make_loader
from floatline.train.data.lengths import padding_of, token_lengths
from floatline.train.data.micro import MicroBatches
from floatline.train.evaluate import Evaluator
from floatline.train.healed import as_of, change_recipe
from floatline.train.hub import holds_adapter, load_model, model_files
from floatline.train.identity import fingerprint, has_checkpoints, note_base, refuse_changed_data, with_free_keys
from floatline.train.launch import refuse_uneven_batch, tell_what_ranks_cannot
from floatline.train.manifest import Manifest
from floatline.train.memory import choose_techniques, forget_plan
from floatline.train.parts import collator_of, encoder_of, optimizer_of, pad_token_id
from floatline.train.recipe import Recipe, parse_recipe
from floatline.train.resolve import AutomaticChoice, Resolved, recipe_text, resolve_recipe
from floatline.train.rundir import RunDirectory
from floatline.train.schedule import make_schedule
from floatline.train.weights import PlainWeights

Say = Callable[[str], None]


@dataclass
class Run:
    """Everything the loop needs."""

    rundir: RunDirectory
    manifest: Manifest
    recipe: Recipe
    processor: Any
    datasets: dict[str, SampleDataset]
    loader: Any
    step: TrainStep
    evaluator: Evaluator
    weights: PlainWeights
    ranks: OneRank
    state: dict[str, Any] | None
    change_recipe: Callable[[str, Any, str], None] = lambda key, value, reason: None


def prepare(recipe: Recipe, rundir: RunDirectory, manifest: Manifest, say: Say, ranks: OneRank | None = None) -> Run:
    """Check everything, choose what is open, load model and data, and find the checkpoint to go on from.

    Every rank reads the data and loads the model; what is chosen is rank 0's choice.

    Raises:
        FloatlineError: One of its kinds, for anything in recipe, data, model or run directory that is not right.
    """
    ranks = ranks or OneRank()
    asked = recipe.model_dump(mode="json")
    encoder, samples = ranks.together(lambda: _check(recipe, manifest, say, ranks))

    def choose() -> tuple[Recipe, list[AutomaticChoice]]:
        return choose_techniques(recipe, encoder, samples["train"], ranks.size, rundir, say)

    resolved = ranks.on_first(lambda: _resolve(recipe, asked, rundir, manifest, len(samples["train"]), choose, say))
    return _build(resolved, encoder, samples, rundir, manifest, say, ranks)


def _check(
    recipe: Recipe, manifest: Manifest, say: Say, ranks: OneRank
) -> tuple[SampleEncoder, dict[str, list[Sample]]]:
    refuse_uneven_batch(recipe, ranks)
    tell_what_ranks_cannot(recipe, ranks, say)
    choice = resolve_precision(recipe.precision, resolve_hardware(recipe.hardware))
    Stack(recipe.make_techniques()).refuse(choice.policy, recipe.train.max_grad_norm)  # before data are read
    encoder = encoder_of(recipe)
    return encoder, _read_all(recipe, encoder, manifest, say)


def _read_all(recipe: Recipe, encoder: SampleEncoder, manifest: Manifest, say: Say) -> dict[str, list[Sample]]:
    """Read and check every split; note counts, skipped samples and fingerprints."""
    samples: dict[str, list[Sample]] = {}
    facts: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        path = getattr(recipe.data, split)
        if path is None:
            continue
        checked = load_samples(
            path, encoder=encoder, max_pixels=recipe.data.max_pixels, on_bad_sample=recipe.data.on_bad_sample
        )
        samples[split] = checked.good
        facts[split] = {
            "path": path,
            "samples": len(checked.good),
            "sha256": fingerprint(path, (image for sample in checked.good for image in sample.images)),
            "skipped": [{"file": str(b.file), "line": b.line, "reason": b.reason} for b in checked.bad],
        }
        if checked.bad:
            say(f"{path}: {len(checked.bad)} bad samples skipped, first: {checked.bad[0].reason}")
    refuse_changed_data(manifest, facts)
    manifest.values["data"] = facts
    return samples


def _resolve(
    recipe: Recipe,
    asked: dict[str, Any],
    rundir: RunDirectory,
    manifest: Manifest,
    train_samples: int,
    choose: Callable[[], tuple[Recipe, list[AutomaticChoice]]],
    say: Say,
) -> Resolved:
    """Fill in what is open; `choose` adds what a plan says, where the recipe asks for one and the run is new."""
    resolved = resolve_recipe(recipe, train_samples=train_samples)
    stored = manifest.values.get("resolved")
    if stored and has_checkpoints(manifest):  # the choices of the first start stay, wherever it goes on
        kept = with_free_keys(stored, asked)
        resolved = resolve_recipe(parse_recipe(kept, str(rundir.path / "recipe.yaml")), train_samples=train_samples)
        resolved.choices = [AutomaticChoice(**choice) for choice in manifest.values.get("choices", [])]
    else:
        forget_plan(rundir)
        if recipe.memory is not None:
            planned, choices = choose()
            resolved = resolve_recipe(planned, train_samples=train_samples)
            resolved.choices = choices + resolved.choices
    for choice in resolved.choices:
        say(f"{choice.key} = {choice.value}  ({choice.reason})")
    tree = resolved.recipe.model_dump(mode="json")
    manifest.update(
        asked=manifest.values["asked"] if stored and has_checkpoints(manifest) else asked,
        resolved=tree,
        choices=resolved.choices_as_dicts(),
    )
    rundir.write_text("recipe.yaml", recipe_text(resolved))
    return resolved


def _build(
    resolved: Resolved,
    encoder: SampleEncoder,
    samples: dict[str, list[Sample]],
    rundir: RunDirectory,
    manifest: Manifest,
    say: Say,
    ranks: OneRank,
) -> Run:
    checkpoint = ranks.on_first(lambda: _checkpoint_to_go_on_from(rundir, say))
    resolved = ranks.on_first(lambda: as_of(checkpoint, resolved, rundir, manifest, say))
    recipe = resolved.recipe
    torch.set_num_threads(recipe.run.threads or torch.get_num_threads())
    rng.seed_everything(recipe.train.seed)  # what techniques draw (adapters) must be the same on all ranks
    datasets = {
        split: SampleDataset(_limit(split, found, recipe), encoder, cache_bytes=recipe.data.cache_bytes or 0)
        for split, found in samples.items()
    }
    model = ranks.together(lambda: load_start(recipe, resolved.policy, checkpoint))
    model.to(resolved.device).train()
    step = make_step(model, resolved)
    if ranks.rank:
        rng.seed_everything(recipe.train.seed, ranks.rank)
    note_techniques(step, manifest, say)
    pad = pad_token_id(encoder.tokenizer)
    loader = _make_loader(datasets["train"], encoder, resolved, step, ranks, say)
    evaluator = Evaluator(
        model,
        step.precision,
        pad_token_id=pad,
        batch_size=recipe.eval.batch_size or recipe.train.batch_size,
        max_new_tokens=recipe.data.max_answer_tokens,
    )
    weights = make_weights(step, encoder.processor, partial(load_start, recipe, resolved.policy))
    if isinstance(weights, AdapterWeights):
        ranks.on_first(lambda: note_base(manifest, recipe.model.path, model_files(recipe.model.path)))
    state = None
    if checkpoint:
        state = weights.resume(checkpoint)
        step.load_state_dict(state["step"])
        _refuse_poisoned(checkpoint, step)
        say(f"resumed from {checkpoint} (update {step_of(checkpoint)})")
        state["best"] = ranks.on_first(partial(_best_that_is_left, state["best"], rundir, say))
    change = partial(change_recipe, resolved, rundir, manifest)
    return Run(
        rundir, manifest, recipe, encoder.processor, datasets, loader, step, evaluator, weights, ranks, state, change
    )


def _make_loader(
    dataset: SampleDataset, encoder: SampleEncoder, resolved: Resolved, step: TrainStep, ranks: OneRank, say: Say
) -> Any:
    """Return the loader of this rank's share of each update, in micro-batches as the recipe asks for.

    A token budget needs bare samples: the loader cuts them. Packing needs whole batches: the step cuts them.
    """
    recipe = resolved.recipe
    bucketing: Any = step.stack.find("batching")
    collate: Any = collator_of(encoder)
    micro_batch_size = recipe.train.micro_batch_size or recipe.train.batch_size
    lengths = token_lengths(dataset.samples, encoder) if bucketing is not None else None
    if lengths is not None:
        sizes = {"batch_size": recipe.train.batch_size, "micro_batch_size": micro_batch_size}
        say(f"batching: first epoch: {padding_of(lengths, bucketing, **sizes, seed=recipe.train.seed)}")
    if bucketing is None or bucketing.max_tokens is None:
        collate = MicroBatches(collate, micro_batch_size)
    return make_loader(
        dataset,
        batch_size=recipe.train.batch_size,
        shuffle=True,
        seed=recipe.train.seed,
        num_workers=recipe.data.num_workers or 0,
        collate=collate,
        drop_last=True,
        pin_memory=resolved.device.type == "cuda",
        bucketing=bucketing,
        lengths=lengths,
        rank=ranks.rank,
        ranks=ranks.size,
    )


def _checkpoint_to_go_on_from(rundir: RunDirectory, say: Say) -> Path | None:
    checkpoint = newest_sound(rundir.checkpoints)
    for path, fault in set_damaged_aside(rundir.checkpoints, checkpoint):
        say(f"damaged checkpoint passed over: {fault}, set aside as {path.name}")
    return checkpoint


def _refuse_poisoned(checkpoint: Path, step: TrainStep) -> None:
    """Every update from weights or moments that are not finite would be one as well.

    Raises:
        CheckpointError: The checkpoint holds some; on each rank, where it is in one rank's share.
    """
    name = not_finite(step.model, step.optimizer)
    if step.agreement.any(bool(name)):
        raise CheckpointError(
            f"checkpoint {checkpoint} is not finite: {name or 'in the share of another rank'}",
            hint="remove it, and the same command goes on from the one before; or start anew in another run.dir",
        )


def load_start(recipe: Recipe, policy: Policy, checkpoint: Path | None) -> nn.Module:
    """Return the model of a checkpoint, or as the recipe starts from; adapters are read later, onto that."""
    if checkpoint and not holds_adapter(checkpoint):
        return load_model(str(checkpoint), checkpoint_format(policy), recipe.model.attention)
    return load_model(recipe.model.path, recipe.model.dtype or "fp32", recipe.model.attention)


def _limit(split: str, samples: list[Sample], recipe: Recipe) -> list[Sample]:
    return samples[: recipe.eval.max_samples] if split == "validation" else samples


def _best_that_is_left(best: dict[str, Any] | None, rundir: RunDirectory, say: Say) -> dict[str, Any] | None:
    """Return the best checkpoint so far, None where it is not there any more, or damaged."""
    if best is None:
        return None
    fault = find_fault(checkpoint_path(rundir.checkpoints, best["best_step"]))
    if fault is not None:
        say(f"the best checkpoint so far is lost ({fault}); the best from now on counts")
        return None
    return best


def checkpoint_format(policy: Policy) -> str:
    """Return the format to load a checkpoint in: the one it was saved in, or fp32, which holds all of them exactly."""
    return policy.base.weights if not policy.rules and not policy.base.master_weights else "fp32"


def make_step(model: nn.Module, resolved: Resolved) -> TrainStep:
    """Return the TrainStep that a resolved recipe describes.

    Optimizer and schedule are made inside, after techniques have added, frozen or sharded parameters.
    """
    train = resolved.recipe.train

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return make_schedule(
            optimizer,
            kind=train.schedule,
            steps=train.steps or 1,
            warmup=train.warmup_steps or 0,
            final=train.final_lr_share,
        )

    step = TrainStep(
        model,
        optimizer_of(train),
        precision=resolved.policy,
        max_grad_norm=train.max_grad_norm,
        guard=Guard(**resolved.recipe.guard.model_dump()),
        techniques=resolved.recipe.make_techniques(),
        schedule=schedule,
    )
    if train.loss_scale is not None:
        step.scaling.set(train.loss_scale)
    return step


def note_techniques(step: TrainStep, manifest: Manifest, say: Say) -> None:
    """Tell what each technique touched and chose, on the screen and in run.json."""
    for note in [*step.precision.notes, *step.stack.notes]:
        say(note)
    manifest.update(
        kept_high=step.precision.kept,
        techniques=[
            {"technique": str(a.technique), "touched": list(a.touched), "notes": list(a.notes)}
            for a in step.stack.applied
        ],
    )

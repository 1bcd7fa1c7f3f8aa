"""Fill in what a recipe leaves open; every automatic choice carries its reason.

The result is a recipe without gaps, which runs the same again, and a list of `AutomaticChoice` for the screen, run.json
and the report.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import yaml

from floatline.errors import ConfigError
from floatline.hardware import Hardware, attention_verdict
from floatline.hardware import resolve as resolve_hardware
from floatline.precision import Policy
from floatline.precision import resolve as resolve_precision
from floatline.train.optimizers import choose_optimizer, technique_of
from floatline.train.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class AutomaticChoice:
    """One value that the recipe left open, and why it is what it is."""

    key: str
    value: Any
    reason: str


@dataclass
class Resolved:
    """A recipe without gaps, its policy, and the choices that were made for the user."""

    recipe: Recipe
    policy: Policy
    device: torch.device
    choices: list[AutomaticChoice] = field(default_factory=list)

    def choices_as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(choice) for choice in self.choices]


def recipe_text(resolved: Resolved) -> str:
    """Return the resolved recipe as YAML, with the reason of each automatic choice beside it as a comment."""
    reasons = {choice.key: choice.reason for choice in resolved.choices}
    lines, section = [], ""
    for line in yaml.safe_dump(resolved.recipe.model_dump(mode="json"), sort_keys=False, width=1000).splitlines():
        name = line.split(":")[0].strip()
        section = name if not line.startswith(" ") else section
        reason = reasons.get(name if not line.startswith(" ") else f"{section}.{name}")
        lines.append(f"{line}  # {reason}" if reason else line)
    return (
        "# Resolved: every choice is made, so this runs the same again. Comments say why.\n" + "\n".join(lines) + "\n"
    )


def resolve_recipe(recipe: Recipe, *, train_samples: int) -> Resolved:
    """Decide everything that `recipe` leaves open.

    Args:
        recipe: As the user wrote it.
        train_samples: Number of usable training samples.

    Raises:
        ConfigError: Sizes that do not fit together.
        PrecisionError: The precision is illegal on the hardware.
    """
    open_recipe = _Filler(recipe)
    hardware = resolve_hardware(recipe.hardware)
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.hardware != "cpu" else "cpu")
    policy = _fill_precision(open_recipe, hardware)
    _fill_optimizer(open_recipe)
    _check_attention(recipe.model.attention, hardware)
    _check_loss_scale(recipe.train.loss_scale, policy)
    _fill_sizes(open_recipe, train_samples)
    _fill_data(open_recipe, device)
    _fill_rhythm(open_recipe, device)
    return Resolved(parse_recipe(open_recipe.tree, "resolved recipe"), policy, device, open_recipe.choices)


class _Filler:
    """A recipe as a tree, with the choices made so far."""

    def __init__(self, recipe: Recipe) -> None:
        self.tree: dict[str, Any] = recipe.model_dump(mode="json")
        self.choices: list[AutomaticChoice] = []

    def get(self, key: str) -> Any:
        section, name = key.split(".")
        return self.tree[section][name]

    def fill(self, key: str, value: Any, reason: str) -> Any:
        """Set `key` if the recipe leaves it open; return its value."""
        section, name = key.split(".")
        if self.tree[section][name] is None:
            self.tree[section][name] = value
            self.choices.append(AutomaticChoice(key, value, reason))
        return self.tree[section][name]


def _fill_precision(filler: _Filler, hardware: Hardware) -> Policy:
    asked = filler.tree["precision"]
    choice = resolve_precision(asked, hardware)
    filler.tree["precision"] = str(choice.policy)
    if asked.split(";")[0].strip() == "auto":
        filler.choices.append(AutomaticChoice("precision", str(choice.policy), choice.reason))
    base = choice.policy.base
    half = not base.mixed and not base.master_weights and not choice.policy.rules
    dtype, why = (
        (base.weights, "the policy trains the weights in this format")
        if half
        else ("fp32", "the policy starts from fp32 weights")
    )
    filler.fill("model.dtype", dtype, why)
    return choice.policy


def _fill_optimizer(filler: _Filler) -> None:
    """Say which optimizer it is, and which technique of the recipe it brought."""
    precision, techniques = filler.tree["precision"], filler.tree["techniques"]
    asked = filler.get("train.optimizer")
    found = technique_of(asked, precision) if asked else None
    if found:
        name = found[0]
        reason = f"train.optimizer={asked} in {precision.split(';')[0]}"
        filler.choices.append(AutomaticChoice(f"techniques.{name}", techniques[name], reason))
    filler.fill("train.optimizer", *choose_optimizer(techniques, precision))


def _check_attention(attention: str | None, hardware: Hardware) -> None:
    """Refuse a kernel that the hardware cannot run; transformers would fail in the first forward, or fall back."""
    kernels = {"flash_attention_2": "flash-attn-2", "flash_attention_3": "flash-attn-3", "flex_attention": "flex"}
    if attention not in kernels:
        return
    verdict = attention_verdict(hardware, kernels[attention])
    if not verdict:
        fused = next((k for k in ("flash", "efficient") if attention_verdict(hardware, k)), "math")
        raise ConfigError(
            f"model.attention={attention} cannot run: {verdict.reason}",
            hint=f"use model.attention=sdpa: torch picks its {fused} kernel there",
        )


def _check_loss_scale(scale: float | None, policy: Policy) -> None:
    if scale is not None and not policy.base.loss_scaling:
        raise ConfigError(
            f"train.loss_scale={scale:g}, but precision {policy} scales no loss",
            hint="leave it out, or use 16-mixed",
        )


def _fill_sizes(filler: _Filler, train_samples: int) -> None:
    batch_size = filler.get("train.batch_size")
    if batch_size > train_samples:
        raise ConfigError(
            f"train.batch_size={batch_size} is more than the {train_samples} training samples",
            hint=f"use train.batch_size={train_samples} or less",
        )
    micro = _fill_micro_batch(filler, batch_size)
    if batch_size % micro:
        raise ConfigError(
            f"train.micro_batch_size={micro} does not divide train.batch_size={batch_size}",
            hint=f"use one of {_divisors(batch_size)}",
        )
    per_epoch = train_samples // batch_size
    epochs = filler.get("train.epochs")
    if filler.get("train.steps") is None and epochs is None:
        epochs = 1.0
        filler.fill("train.steps", per_epoch, f"one epoch of {train_samples} samples in batches of {batch_size}")
    elif epochs is not None:
        steps = max(1, round(epochs * per_epoch))
        filler.fill("train.steps", steps, f"{epochs:g} epochs of {per_epoch} updates")
        filler.tree["train"]["epochs"] = None
    steps = filler.get("train.steps")
    warmup = filler.fill("train.warmup_steps", min(100, steps // 10), "a tenth of the updates, at most 100")
    if warmup > steps:
        raise ConfigError(
            f"train.warmup_steps={warmup} is more than train.steps={steps}", hint=f"use at most {steps}, or null"
        )


def _fill_micro_batch(filler: _Filler, batch_size: int) -> int:
    """Samples per forward: as asked, as techniques.accumulation asks, or the whole batch.

    Packing and a token budget make the micro-batches themselves, of whole batches.
    """
    techniques = {name: value for name, value in filler.tree["techniques"].items() if value}
    budget = techniques.get("batching", {}).get("max_tokens")
    cutter = f"techniques.batching.max_tokens={budget}" if budget else "packing" if "packing" in techniques else ""
    asked = filler.get("train.micro_batch_size")
    if cutter and asked not in (None, batch_size):
        other = "" if budget else ", or use techniques.accumulation.micro_batches"
        hint = f"leave train.micro_batch_size open{other}"
        raise ConfigError(f"{cutter} and train.micro_batch_size={asked} both make micro-batches", hint=hint)
    if budget and "accumulation" in techniques:
        raise ConfigError(
            f"{cutter} and techniques.accumulation both make micro-batches", hint="set techniques.accumulation=null"
        )
    if cutter:
        return int(filler.fill("train.micro_batch_size", batch_size, f"{cutter} makes the micro-batches"))
    if "accumulation" in techniques:
        return _micro_batch_of_accumulation(filler, batch_size, techniques["accumulation"]["micro_batches"])
    return int(filler.fill("train.micro_batch_size", batch_size, "no split of the batch was asked for"))


def _micro_batch_of_accumulation(filler: _Filler, batch_size: int, parts: int) -> int:
    key = f"techniques.accumulation.micro_batches={parts}"
    micro = int(filler.fill("train.micro_batch_size", -(-batch_size // parts), f"{key} of {batch_size} samples"))
    if -(-batch_size // micro) != parts:
        raise ConfigError(
            f"{key} and train.micro_batch_size={micro} do not fit train.batch_size={batch_size}",
            hint=f"use a number of micro-batches from {_divisors(batch_size)}, and leave train.micro_batch_size open",
        )
    return micro


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _fill_data(filler: _Filler, device: torch.device) -> None:
    if device.type == "cpu":
        filler.fill("data.num_workers", 0, "on CPU the model needs the cores itself")
    else:
        filler.fill("data.num_workers", 2, "samples are prepared while the GPU works")
    filler.fill(
        "data.cache_bytes", 2**30, "prepared samples are kept in up to 1 GiB, so that later epochs skip the work"
    )
    filler.fill(
        "eval.batch_size", 4 * filler.get("train.micro_batch_size"), "no gradients: room for four times as many"
    )


def _fill_rhythm(filler: _Filler, device: torch.device) -> None:
    steps = filler.get("train.steps")
    filler.fill("train.checkpoint_every", max(1, min(500, -(-steps // 5))), "five a run, at most 500 updates apart")
    if filler.get("data.validation") is not None:
        filler.fill("eval.every", max(1, -(-steps // 10)), "ten a run")
        metric = "accuracy" if filler.get("eval.generate") else "loss"
        filler.fill("eval.metric", metric, "what a user of the model notices" if metric == "accuracy" else "no answers")
        filler.fill("eval.max_samples", 256, "enough for a trend; the test split is used whole")
    if device.type == "cpu":
        filler.fill("run.log_every", 1, "reading the loss costs nothing on CPU")
    else:
        filler.fill("run.log_every", 10, "reading the loss makes the host wait for the GPU")
    filler.fill("run.threads", torch.get_num_threads(), "what torch found")

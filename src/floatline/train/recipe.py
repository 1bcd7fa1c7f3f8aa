"""The recipe: what a run is, as YAML with dotted overrides.

    model: {path: Qwen/Qwen3-VL-2B-Instruct}
    data:  {train: train.jsonl, validation: validation.jsonl}
    train: {epochs: 3, batch_size: 32, lr: 1e-4}
    techniques: {checkpointing: {every: 2}, offload: true}

Every key has a type, a range and a default; `null` means "decide for me", and train/resolve.py fills it in with a
reason. Unknown keys are errors that name the nearest known key. Paths are taken relative to the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from floatline.errors import ConfigError, did_you_mean
from floatline.techniques import Technique
from floatline.train.optimizers import Choice, optimizer_tree, ruled_out
from floatline.train.techniques import read_techniques, technique_tree

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of the recipe's sections: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    path: Annotated[str, Field(description="Hugging Face directory or hub id")]
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(None, description="format the weights are loaded in")
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = Field(
        None, description="attention kernel; null leaves it to transformers (SDPA where the model has it)"
    )


class DataSection(Section):
    train: Annotated[str, Field(description="messages JSONL to train on")]
    validation: str | None = Field(None, description="messages JSONL for evaluation during the run")
    test: str | None = Field(None, description="messages JSONL for the final evaluation of the best checkpoint")
    on_bad_sample: Literal["stop", "skip"] = Field("stop", description="what an unusable sample does")
    max_pixels: Count | None = Field(
        None, description="largest image (width x height) that is accepted; null lets the processor resize"
    )
    max_answer_tokens: Count = Field(64, description="longest answer that is accepted, and longest generated")
    max_length: Count | None = Field(None, description="longest sequence that is accepted, in tokens")
    num_workers: Annotated[int, Field(ge=0)] | None = Field(None, description="processes that prepare samples")
    cache_bytes: Annotated[int, Field(ge=0)] | None = Field(None, description="memory for prepared samples")


class TrainSection(Section):
    steps: Count | None = Field(None, description="optimizer updates; give steps or epochs")
    epochs: Positive | None = Field(None, description="passes over the training data; give steps or epochs")
    batch_size: Count = Field(8, description="samples per optimizer update")
    micro_batch_size: Count | None = Field(None, description="samples per forward; divides batch_size")
    optimizer: Choice | None = Field(
        None,
        description="how small updates are kept; null is adamw-plain in bf16-true, else adamw, or as a technique says",
    )
    lr: Positive = Field(1e-4, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="course after the warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="updates of linear warm-up")
    final_lr_share: Share = Field(0.0, description="learning rate at the end, as a share of lr")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="AdamW's decoupled weight decay")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's moment decays")
    max_grad_norm: Positive | None = Field(1.0, description="clip to this gradient norm; null switches it off")
    loss_scale: Positive | None = Field(
        None, description="fp16 loss scale to start from; at 1 and below it does not grow; null starts at 65536"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seeds python, numpy, torch and the data order")
    checkpoint_every: Count | None = Field(None, description="updates between checkpoints")
    keep_last: Count = Field(2, description="checkpoints kept besides the best")


class EvalSection(Section):
    every: Count | None = Field(None, description="updates between evaluations on data.validation")
    batch_size: Count | None = Field(None, description="samples per forward in evaluation")
    max_samples: Count | None = Field(None, description="samples of data.validation that are used")
    generate: bool = Field(True, description="also answer the questions and score exact matches")
    metric: Literal["accuracy", "loss"] | None = Field(None, description="what makes a checkpoint the best")


class GuardSection(Section):
    on_fault: Literal["skip", "rollback", "stop", "heal"] = Field(
        "skip", description="what an update that is not finite does; heal diagnoses it and applies the cure"
    )
    check: Literal["auto", "before-backward", "after-backward"] = Field(
        "auto", description="when the loss is read; auto is before the backward on CPU, after it on CUDA"
    )
    max_faults_in_a_row: Count = Field(5, description="non-finite updates in a row that stop the run")
    max_faults: Count | None = Field(100, description="non-finite updates in all that stop the run")
    max_overflows_in_a_row: Count = Field(24, description="loss-scale reductions in a row that stop the run")
    max_rollbacks: Count = Field(3, description="times the run goes back to one snapshot before it stops")
    snapshot_every: Count = Field(100, description="updates between snapshots, for rollback and heal")
    sample_every: Count | None = Field(100, description="updates between looks for silent trouble; null never looks")


class RunSection(Section):
    dir: Annotated[str, Field(description="directory of this run; created, locked, resumed from")] = "runs/latest"
    log_every: Count | None = Field(None, description="updates between reads of the loss from the device")
    gradients_every: Count | None = Field(
        10, description="updates between looks at each layer's gradients; null keeps no history of them"
    )
    threads: Count | None = Field(None, description="CPU threads of torch")


class Recipe(Section):
    """A whole recipe. See `floatline train --help` and docs/reference/recipe.md for every key."""

    model: ModelSection
    data: DataSection
    precision: str = Field("auto", description="a policy: auto, bf16-mixed, '16-mixed; lm_head=32', ...")
    hardware: str = Field("auto", description="whose rules apply: auto (this machine), cpu, t4, a100-40gb, ...")
    memory: Literal["auto", "exact"] | None = Field(
        None,
        description="auto plans before training and adds the techniques with which the run fits, exact only those that "
        "leave the numbers as they are; null adds none",
    )
    techniques: dict[str, Any] = Field(
        {},
        description="technique: its settings; true takes the defaults, null or false leaves it out, of a plan too",
    )
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    guard: GuardSection = GuardSection()
    run: RunSection = RunSection()

    def make_techniques(self) -> list[Technique]:
        """Return the techniques that the recipe names.

        Raises:
            ConfigError: Unknown technique or setting, or a value that does not fit.
        """
        return read_techniques(self.techniques)

    @property
    def used(self) -> dict[str, Any]:
        """The techniques that the recipe uses, name -> settings; not those that a plan is told to leave out."""
        return {name: value for name, value in self.techniques.items() if value is not False}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of techniques that a plan must not use."""
        said = tuple(name for name, value in self.techniques.items() if value is False)
        settled = ruled_out(self.train.optimizer, self.precision)
        return tuple(dict.fromkeys((*said, *settled)))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `key=value` overrides.

    Args:
        path: YAML file.
        overrides: e.g. ["train.lr=1e-4", "precision=16-mixed"]; values are YAML.

    Raises:
        ConfigError: The file is missing or no YAML mapping, a key is unknown, or a value does not fit.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, where=str(path))


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a nested dict as a recipe; `where` names it in errors.

    Raises:
        ConfigError: As `load_recipe`.
    """
    try:
        tree = optimizer_tree(technique_tree(tree), tree.get("techniques"))
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, where) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None
    if recipe.train.steps is not None and recipe.train.epochs is not None:
        raise ConfigError(
            f"{where}: train.steps={recipe.train.steps} and train.epochs={recipe.train.epochs} are both set",
            hint="set one of them to null",
        )
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist", hint="see examples/ for recipes that run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} holds a {type(tree).__name__}, not sections", hint="see examples/")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not KEY=VALUE", hint="write e.g. train.lr=1e-4")
    *sections, name = key.strip().split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if inner in (True, False, None):  # a technique that was on or off gets settings
            inner = tree[section] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        tree = inner
    try:
        tree[name] = yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        tree[name] = text


def _explain(error: ValidationError, where: str) -> ConfigError:
    """Turn pydantic's first complaint into one sentence with the dotted key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *path, name = (str(part) for part in first["loc"])
        return ConfigError(f"{where}: unknown key {key}", hint=_near_keys(path, name))
    if first["type"] == "missing":
        return ConfigError(f"{where}: {key} is missing", hint=f"add it: {key}=... on the command line, or in the file")
    return ConfigError(f"{where}: {key}={first['input']!r}: {first['msg']}", hint=_describe(first["loc"]))


def keys_of(path: list[str]) -> list[str]:
    """Return the key names of a section given by its path ([] is the top)."""
    model: Any = Recipe
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _near_keys(path: list[str], name: str) -> str:
    hint = did_you_mean(name, keys_of(path))
    if hint.startswith("allowed") and not path:
        homes = [f"{section}.{name}" for section in keys_of([]) if name in _section_keys(section)]
        if homes:
            return f"did you mean {homes[0]!r}?"
    return hint


def _section_keys(section: str) -> list[str]:
    annotation = Recipe.model_fields[section].annotation
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, Section) else []


def _describe(loc: tuple[int | str, ...]) -> str:
    model: Any = Recipe
    for part in loc:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            break
        field = fields[part]
        model = field.annotation
        if field.description:
            allowed = [str(value) for value in _literals(field.annotation)]
            return field.description + (f"; allowed: {', '.join(allowed)}" if allowed else "")
    return ""


def _literals(annotation: Any) -> list[Any]:
    found: list[Any] = []
    for inner in get_args(annotation):
        found += [inner] if isinstance(inner, str) else _literals(inner)
    return found

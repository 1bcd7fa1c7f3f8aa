"""Turn MODEL, a text, into a workload that can be planned: `load_source`.

MODEL is a Hugging Face directory, a config.json, a hub id in the local cache, `module:function`, or the name of a
bundled description. The result builds its model and its batch only when asked, so that a planner can do so under fake
tensors. Weights are never read.

    source = load_source("qwen3-vl-2b", Shape(batch=2, image=(1024, 1024)))
    source.work.build_model()          # under FakeTensorMode: seconds, no memory
    source.reshaped(Shape(batch=4))    # the same model, another batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from floatline.errors import ConfigError
from floatline.plan.building import count_parameters, drops_layers, model_factory
from floatline.plan.configs import Found, find_config, load_transformers
from floatline.plan.functions import call_for_workload, load_function
from floatline.plan.inputs.audio import lay_out_speech, lay_out_waveform
from floatline.plan.inputs.layout import Layout
from floatline.plan.inputs.text import lay_out_text
from floatline.plan.inputs.vision import lay_out_images, lay_out_pairs
from floatline.plan.inputs.vision_language import lay_out_vision_language
from floatline.plan.positions import text_config
from floatline.plan.shape import Filling, Shape, SizeChoice
from floatline.plan.tasks import Training, choose_training, config_for
from floatline.step.workload import Workload

LAYER_DROP_OFF = "no layer is skipped at random, though the config asks for it: the largest update is planned"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to plan, with a batch of one shape.

    Args:
        name: What the model is called.
        kind: "causal-lm", "vision-language", "encoder", "seq2seq", "vision", "contrastive", "speech-seq2seq", "audio"
            or "module".
        work: The workload; its factories run under real and under fake tensors.
        shape: The sizes, all that apply filled in.
        origin: Where the description is from.
        task: How it is trained; empty for a user's function.
        dtype: Format of the checkpoint's weights as the config names it, e.g. "bfloat16"; None where it does not.
        limits: The largest sizes the model takes, e.g. {"seq": 1024}.
        choices: Sizes that were left open, each with its reason.
        notes: Sentences a user should read: roundings and assumptions.
        facts: Counts a sample, e.g. {"tokens": 1282, "visual_tokens": 1024}.
    """

    name: str
    kind: str
    work: Workload
    shape: Shape
    origin: str
    task: str = ""
    dtype: str | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    choices: tuple[SizeChoice, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, int] = field(default_factory=dict)
    lay_out: Callable[[Shape], Source] = field(repr=False)
    count: Callable[[], int | None] = field(repr=False)

    @cached_property
    def parameters(self) -> int | None:
        """Number of parameters, tied ones once, counted on the meta device; None for a user's function."""
        return self.count()

    def reshaped(self, shape: Shape) -> Source:
        """Return the same model with a batch of another shape; open sizes are filled in anew.

        Raises:
            ConfigError: The model does not take the shape.
        """
        return self.lay_out(shape)


def load_source(
    text: str, shape: Shape | None = None, *, task: str | None = None, dtype: torch.dtype = torch.float32
) -> Source:
    """Return the model that `text` means, with a batch of a shape.

    Args:
        text: Directory, config.json, hub id, `module:function` or bundled name.
        shape: Sizes of the batch; what is open gets a default with a reason.
        task: How to train it ("causal-lm", "masked-lm", "sequence-classification" ...); None follows the config.
        dtype: Format in which the model is built; policies cast from fp32.

    Raises:
        ConfigError: A shape or task that the model does not take.
        ModelError: No such model, or what is there is not one.

    Example:
        >>> source = load_source("gpt2", Shape(batch=4))
        >>> source.kind, source.shape.seq, source.parameters
        ('causal-lm', 1024, 124439808)
    """
    shape = shape or Shape()
    place, colon, function = text.rpartition(":")
    if colon and place and function.isidentifier():
        if task is not None:
            raise ConfigError(f"task={task} was given, but {text} brings its own loss", hint="leave the task out")
        return _from_function(text, shape)
    return _from_config(find_config(text), shape, task, dtype)


def _from_function(text: str, shape: Shape) -> Source:
    function = load_function(text)

    def lay_out(shape: Shape) -> Source:
        work, notes = call_for_workload(function, shape, text)
        name = text.rpartition(":")[2]
        return Source(
            name=name,
            kind="module",
            work=work,
            shape=shape,
            origin=text,
            notes=notes,
            lay_out=lay_out,
            count=lambda: None,
        )

    return lay_out(shape)


def _from_config(found: Found, shape: Shape, task: str | None, dtype: torch.dtype) -> Source:
    load_transformers()
    training = choose_training(found.config, task, found.name)
    found = replace(found, config=config_for(training.cls, found.config))
    build = model_factory(training.cls, found.config, dtype)
    counted = lru_cache(maxsize=1)(lambda: count_parameters(training.cls, found.config))
    declared = _declared_dtype(found.config)
    dropping = LAYER_DROP_OFF if drops_layers(found.config) else ""

    def lay_out(shape: Shape) -> Source:
        layout = _layout(Filling(shape, found.name), found, training)
        return Source(
            name=found.name,
            kind=training.task.kind,
            work=Workload(model=build, batch=layout.batch, loss=layout.loss, optimizer=_adamw),
            shape=layout.shape,
            origin=found.origin,
            task=training.task.name,
            dtype=declared,
            limits=layout.limits,
            choices=layout.choices,
            notes=tuple(note for note in (*found.notes, training.note, dropping, *layout.notes) if note),
            facts=layout.facts,
            lay_out=lay_out,
            count=counted,
        )

    return lay_out(shape)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of `floatline train`: fused, so that no temporaries of the weights' size exist in its step."""
    return torch.optim.AdamW(parameters, fused=True)


def _layout(filling: Filling, found: Found, training: Training) -> Layout:
    config, cls, task, kind = found.config, training.cls, training.task.name, training.task.kind
    if kind == "vision-language":
        return lay_out_vision_language(filling, config, cls, found.processor)
    if kind == "vision":
        return lay_out_images(filling, config, cls)
    if kind == "contrastive":
        return lay_out_pairs(filling, config)
    if kind == "speech-seq2seq":
        return lay_out_speech(filling, config, cls)
    if kind == "audio":
        return lay_out_waveform(filling, config, task, cls)
    return lay_out_text(filling, config, task, kind)


def _declared_dtype(config: Any) -> str | None:
    dtype = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")

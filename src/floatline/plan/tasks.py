"""Which transformers class trains a config: what its `architectures` name, else what transformers maps its type to.

A class is used when a batch for it is known and its output holds a loss. A checkpoint that names a bare body
(`Qwen3Model`, `Dinov2Model`) or a pretraining head with inputs of its own gets the usual head of its type, with a note.

Not covered: detection, segmentation, depth, video, generation of speech: give those as `module:function`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from floatline.errors import ConfigError, ModelError, did_you_mean
from floatline.plan.positions import text_config


@dataclass(frozen=True)
class Task:
    """A way to train.

    Args:
        name: As users write it.
        kind: The kind of model: what its batch looks like.
        mapping: Name of transformers' table from model type to class.
    """

    name: str
    kind: str
    mapping: str


TASKS = (
    Task("image-text-to-text", "vision-language", "IMAGE_TEXT_TO_TEXT"),
    Task("speech-seq2seq", "speech-seq2seq", "SPEECH_SEQ_2_SEQ"),
    Task("seq2seq-lm", "seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"),
    Task("masked-lm", "encoder", "MASKED_LM"),
    Task("causal-lm", "causal-lm", "CAUSAL_LM"),
    Task("image-classification", "vision", "IMAGE_CLASSIFICATION"),
    Task("ctc", "audio", "CTC"),
    Task("contrastive", "contrastive", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    Task("sequence-classification", "encoder", "SEQUENCE_CLASSIFICATION"),
    Task("token-classification", "encoder", "TOKEN_CLASSIFICATION"),
    Task("question-answering", "encoder", "QUESTION_ANSWERING"),
    Task("audio-classification", "audio", "AUDIO_CLASSIFICATION"),
)
"""In the order in which a type without a usable head is looked for."""


@dataclass(frozen=True)
class Training:
    """The class to train, how, and a note where that is not what the config names."""

    task: Task
    cls: Any
    note: str = ""


def choose_training(config: Any, asked: str | None, model: str) -> Training:
    """Return the class that trains `config`.

    Args:
        config: A transformers config.
        asked: Name of a task; None follows the config.
        model: What the model is called in errors.

    Raises:
        ConfigError: `asked` is no task, or the model has no head for it.
        ModelError: No task fits the model.
    """
    if asked is not None:
        return _asked_for(config, asked, model)
    named = list(config.architectures or [])
    for architecture in named:
        for task in TASKS:
            if architecture in _classes(task):
                return Training(task, _load(architecture))
    for task in TASKS:
        if task.name == "masked-lm" and getattr(config, "is_decoder", False):
            continue
        cls = _class_of(config, task)
        if cls is not None:
            why = (
                f"the config names {named[0]}, which has no loss for a batch known here" if named else "no class named"
            )
            return Training(task, cls, f"{why}; trained as {cls.__name__} ({task.name})")
    raise ModelError(
        f"{model} (model_type {config.model_type}) fits none of the tasks {_names()}",
        hint="give module:function that returns a floatline.Workload",
    )


def _asked_for(config: Any, asked: str, model: str) -> Training:
    task = next((task for task in TASKS if task.name == asked), None)
    if task is None:
        raise ConfigError(f"unknown task {asked!r}", hint=did_you_mean(asked, [task.name for task in TASKS]))
    cls = _class_of(config, task)
    if cls is None:
        known = [other.name for other in TASKS if _class_of(config, other) is not None]
        raise ConfigError(f"{model} has no head for the task {asked}", hint=f"it has: {', '.join(known) or 'none'}")
    return Training(task, cls)


def config_for(cls: Any, config: Any) -> Any:
    """Return the part of `config` that a class is made of: the text's, for a text head of a larger model."""
    text = text_config(config)
    return text if type(text) is cls.config_class and type(config) is not cls.config_class else config


def _mapping(task: Task) -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{task.mapping}_MAPPING_NAMES", {}))


def _classes(task: Task) -> set[str]:
    values = _mapping(task).values()
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def _class_of(config: Any, task: Task) -> Any:
    found = _mapping(task).get(config.model_type)
    return _load(found if isinstance(found, str) else found[0]) if found else None


def _load(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _names() -> str:
    return ", ".join(task.name for task in TASKS)

"""Load a model and its processor from a Hugging Face directory or hub id.

The same two functions load the demo's 1.4 M-parameter model and Qwen/Qwen3-VL-2B-Instruct. Two things differ from a
bare `from_pretrained`:

- torchvision is not needed. Transformers builds a video processor for every Qwen-VL processor, and that part alone
  wants torchvision; without it the processor is loaded without its video side (`image_only`).
- a missing directory, one of adapters alone or an unknown architecture is one clear error.

Not covered: remote code (`trust_remote_code`), quantised checkpoints, video input.
"""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from floatline.errors import ConfigError, ModelError
from floatline.precision.islands import DTYPES
from floatline.techniques.optim_steps.low_bit_state import quiet_torchao

quiet_torchao()  # here and not later: worker processes unpickle a processor, which imports transformers


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def require_transformers() -> Any:
    """Return the transformers module.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "training from a recipe needs transformers, which is not installed",
            hint='pip install "floatline[train]"',
        ) from None
    transformers.utils.logging.disable_progress_bar()  # its bars for shards would break ours
    return transformers


@cache
def image_only(processor_class: type) -> type:
    """Return a subclass of a transformers processor class that has no video side.

    It saves and loads the same files (minus `video_preprocessor_config.json`) under the original class name, so
    that a directory written by it also loads where torchvision is installed.
    """

    class ImageOnly(processor_class):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

        def __reduce__(self) -> tuple[Any, ...]:  # the class is found by no name, and worker processes need a copy
            return _blank_image_only, (processor_class,), self.__dict__

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__
    return ImageOnly


def _blank_image_only(processor_class: type) -> Any:
    made: Any = image_only(processor_class)
    return made.__new__(made)


def load_processor(path: str) -> Any:
    """Return the processor of a model directory: with images where it has them, else the tokenizer.

    Raises:
        ModelError: The directory is missing or holds neither processor nor tokenizer, or has no chat template.
    """
    transformers = require_transformers()
    _check_place(path)
    try:
        processor = _processor_class(path, transformers).from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"no processor can be loaded from {path}: {_first_line(error)}",
            hint="model.path must be a Hugging Face directory (or a hub id) with tokenizer and processor files",
        ) from None
    if not getattr(processor, "chat_template", None):
        raise ModelError(f"{path} has no chat template", hint="add chat_template.jinja to the directory")
    return processor


def _processor_class(path: str, transformers: Any) -> Any:
    """The class that `processor_class` names, without its video side where torchvision is missing."""
    name = _named_processor(path)
    named = getattr(transformers, name, None) if name else None
    if named is None:
        return transformers.AutoProcessor
    if "video_processor" in named.get_attributes() and (not has_torchvision() or _has_no_video_files(path)):
        return image_only(named)
    return named


def _named_processor(path: str) -> str | None:
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        name = _read_json(path, file).get("processor_class")
        if name:
            return str(name)
    return None


def _has_no_video_files(path: str) -> bool:
    return Path(path).is_dir() and not (Path(path) / "video_preprocessor_config.json").exists()


def _read_json(path: str, file: str) -> dict[str, Any]:
    from transformers.utils import cached_file

    found = cached_file(path, file, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}


def load_model(path: str, dtype: str, attention: str | None = None) -> nn.Module:
    """Return the model of a directory or hub id, on the CPU.

    Args:
        path: Hugging Face directory or hub id: vision-language models first, else causal language models.
        dtype: Format of the weights: "fp32", "bf16" or "fp16".
        attention: transformers' `attn_implementation`; None leaves the choice to transformers.

    Raises:
        ModelError: Nothing there, an unknown architecture, damaged weights, or weights missing from the files.
    """
    require_transformers()
    _check_place(path)
    if holds_adapter(path):
        raise ModelError(
            f"{path} holds adapters, not a whole model",
            hint="merge them into their base model first: floatline.train.merge_checkpoint(path, target)",
        )
    try:
        auto, _ = _auto_class(path)
        model, info = auto.from_pretrained(
            path, dtype=DTYPES[dtype], attn_implementation=attention, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many types for one thing: it cannot be loaded
        raise _cannot_load(path, error) from error
    if info["missing_keys"]:
        raise ModelError(
            f"{path} lacks {len(info['missing_keys'])} weights, e.g. {sorted(info['missing_keys'])[0]}",
            hint="the files are incomplete; download or save the model again",
        )
    return model


def describe_model(path: str) -> tuple[Any, Any]:
    """Return the class and the config of the model that `load_model` would load; weights are not read.

    Raises:
        ModelError: Nothing there, or an unknown architecture.
    """
    require_transformers()
    _check_place(path)
    from transformers.models.auto.auto_factory import _get_model_class

    try:
        auto, config = _auto_class(path)
        if type(config) not in auto._model_mapping:
            raise ValueError(f"{type(config).__name__} is no vision-language or causal model's")
        return _get_model_class(config, auto._model_mapping), config
    except Exception as error:  # as in load_model
        raise _cannot_load(path, error) from error


def _auto_class(path: str) -> tuple[Any, Any]:
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(path)
    image_text = transformers.AutoModelForImageTextToText
    return image_text if type(config) in image_text._model_mapping else transformers.AutoModelForCausalLM, config


def _cannot_load(path: str, error: Exception) -> ModelError:
    return ModelError(
        f"no model can be loaded from {path}: {_first_line(error)}",
        hint="model.path must hold config.json and weights (safetensors) of a vision-language or causal model",
    )


def holds_adapter(path: str | Path) -> bool:
    """Say whether a directory holds adapters in peft's format and no model of its own."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def model_files(path: str) -> list[Path]:
    """Return the files of a model that was loaded: its config and weights, of a directory or a hub id's cache."""
    from transformers.utils import cached_file

    home = Path(str(cached_file(path, "config.json"))).parent
    weights = sorted(home.glob("*.safetensors*")) or sorted(home.glob("*.bin*"))
    return [home / "config.json", *weights]


def _check_place(path: str) -> None:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"model.path={path}: no such directory", hint="give a directory or a hub id like Qwen/NAME")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

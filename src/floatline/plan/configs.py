"""Find the config that a MODEL text means, on this machine only.

In this order: a directory or a config.json, a bundled name, a hub id in the local cache of Hugging Face, the hub id of
a bundled model. Nothing is downloaded and no code of a checkpoint is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from floatline.errors import ConfigError, ModelError
from floatline.plan.bundled import Description, bundled_name, bundled_names, describe

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
GIVE = "give a Hugging Face directory, a config.json, a hub id, module:function or a bundled name"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A config and what was beside it.

    Args:
        name: What the model is called from here on.
        config: A transformers config.
        origin: Where it is from, for the user.
        processor: Facts of the image processor; empty where there are none.
        parameters: The published count of a bundled model.
        notes: Sentences a user should read.
    """

    name: str
    config: Any
    origin: str
    processor: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    notes: tuple[str, ...] = ()


def find_config(text: str) -> Found:
    """Return the config that `text` means.

    Raises:
        ConfigError: transformers is not installed.
        ModelError: Nothing of that name, or it is not a model.
    """
    path = Path(text).expanduser()
    name = bundled_name(text)
    if path.is_dir() and ((path / "config.json").is_file() or name is None):
        return _from_directory(path, path.resolve().name)
    if path.is_file():
        return _from_file(path)
    if text.startswith((".", "/", "~")) or text.endswith((".json", *WEIGHTS)) or text.count("/") > 1:
        raise ModelError(f"{text}: no such file or directory", hint=GIVE)
    if name is not None and "/" not in text:
        return _from_bundle(describe(name))
    return _from_hub(text, name)


def load_transformers() -> Any:
    """Return the transformers module.

    Raises:
        ConfigError: It is not installed.
    """
    from floatline.techniques.optim_steps.low_bit_state import quiet_torchao

    quiet_torchao()
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "planning a Hugging Face model needs transformers, which is not installed",
            hint='pip install "floatline[train]", or give module:function',
        ) from None
    return transformers


def _from_hub(text: str, name: str | None) -> Found:
    if "/" in text and (folder := _cached(text)) is not None:
        return _from_directory(folder, text)
    if name is not None:
        return _from_bundle(describe(name), f"{text} is not in the local cache; the bundled description is used")
    if "/" in text:
        raise ModelError(
            f"{text} is not in the local Hugging Face cache, and a plan downloads nothing",
            hint=f"run `hf download {text} config.json`, or {GIVE}",
        )
    from difflib import get_close_matches

    near = get_close_matches(text.lower(), bundled_names(), n=3, cutoff=0.4)
    listed = "did you mean " + " or ".join(near) + "?" if near else f"bundled: {', '.join(bundled_names())}"
    raise ModelError(f"no model called {text!r}", hint=f"{listed} Else {GIVE}")


def _cached(hub_id: str) -> Path | None:
    """The snapshot folder of a hub id in the local cache; None where its config was never downloaded."""
    load_transformers()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(hub_id, file)
        except HFValidationError as error:
            raise ModelError(f"{hub_id!r} is no hub id: {_first_line(error)}", hint=GIVE) from None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _from_bundle(description: Description, note: str = "") -> Found:
    config = _to_config(dict(description.config), f"the bundled {description.name}")
    return Found(
        name=description.name,
        config=config,
        origin=f"bundled description of {description.hub}",
        processor=description.processor,
        parameters=description.parameters,
        notes=(note,) if note else (),
    )


def _from_directory(folder: Path, name: str) -> Found:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
            raise ModelError(f"{name} holds adapters of {base}, not a model", hint=f"plan its base model: {base}")
        raise ModelError(f"{name} has no config.json", hint=GIVE)
    found = _from_file(folder / "config.json")
    return Found(name=name, config=found.config, origin=str(folder), processor=_processor(folder), notes=found.notes)


def _from_file(path: Path) -> Found:
    if path.suffix in WEIGHTS:
        raise ModelError(
            f"{path.name} holds weights, and a plan needs the model's description",
            hint="give the config.json beside it",
        )
    tree = _read(path)
    if "model_type" not in tree:
        base = tree.get("base_model_name_or_path")
        if base:
            raise ModelError(
                f"{path.name} describes adapters of {base}, not a model", hint=f"plan its base model: {base}"
            )
        raise ModelError(
            f"{path} is not a model: it has no model_type", hint="give the config.json of a Hugging Face model"
        )
    notes = []
    if "quantization_config" in tree:
        notes.append("the checkpoint is quantised; its model is planned with plain weights")
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    processor = _processor(path.parent) if path.name == "config.json" else {}
    return Found(
        name=name, config=_to_config(tree, str(path)), origin=str(path), processor=processor, notes=tuple(notes)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise ModelError(f"{path} is not JSON: {_first_line(error)}", hint=GIVE) from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} is not a model: it holds a {type(tree).__name__}, not keys and values", hint=GIVE)
    return tree


def _processor(folder: Path) -> dict[str, Any]:
    """Facts of the image processor: transformers 4 and 5 write them to different files."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            tree = _read(folder / file)
            return dict(tree.get("image_processor") or tree)
    return {}


def _to_config(tree: dict[str, Any], origin: str) -> Any:
    transformers = load_transformers()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = tree["model_type"]
    if kind not in CONFIG_MAPPING:
        own = " It brings code of its own, which a plan does not run." if "auto_map" in tree else ""
        raise ModelError(
            f"{origin}: transformers {transformers.__version__} has no model_type {kind!r}.{own}",
            hint="update transformers, or give module:function that returns a floatline.Workload",
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(tree)
    except Exception as error:  # configs check themselves in many ways for one thing: this is not a config of that type
        raise ModelError(
            f"{origin} is no config of a {kind}: {_said(error)}", hint="compare it with a published config.json"
        ) from error


def _said(error: BaseException) -> str:
    """The first line, and the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Take a model from a function of the user's: `module:function`, or `path/to/file.py:function`.

The function is called with those of `batch, seq, target, image, images, seconds` that it names as parameters and that
were asked for; a size it does not name cannot be asked for. It returns one of

    a Workload                   best with factories: nothing is built until it is built under fake tensors
    (model, batch)               modules and tensors, or factories of them
    (model, batch, loss)         loss: (model, batch) -> scalar

A module that is returned as such was built in real memory once; the plan builds it again by calling the function.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from floatline.errors import ConfigError, ModelError, did_you_mean
from floatline.plan.shape import Shape
from floatline.step.workload import Workload

BUILT = "the function built its model in real memory; return a factory or a Workload of factories to avoid that"


def load_function(text: str) -> Callable[..., Any]:
    """Return the function that `module:function` names; modules are also looked for in the working directory.

    Raises:
        ModelError: No such module or function, or it is not callable.
    """
    place, _, name = text.rpartition(":")
    module = _load_file(Path(place), text) if place.endswith(".py") else _load_module(place, text)
    found = getattr(module, name, None)
    if found is None:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"{text}: {place} has no {name!r}", hint=did_you_mean(name, known))
    if not callable(found):
        raise ModelError(
            f"{text} is a {type(found).__name__}, not a function", hint="name a function without arguments"
        )
    return found


def call_for_workload(function: Callable[..., Any], shape: Shape, text: str) -> tuple[Workload, tuple[str, ...]]:
    """Return the workload that a user's function describes, and notes.

    Raises:
        ConfigError: A size was asked for that the function does not take.
        ModelError: The function failed, or returned something else.
    """
    sizes = _sizes(function, shape, text)

    def call() -> Any:
        return function(**sizes)

    try:
        made = call()
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{text} failed: {type(error).__name__}: {error}", hint="run it on its own to see where"
        ) from error
    if isinstance(made, Workload):
        return made, (BUILT,) if isinstance(made.model, nn.Module) else ()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ModelError(
            f"{text} returned a {type(made).__name__}", hint="return a floatline.Workload, or (model, batch[, loss])"
        )
    model, batch, loss = (*made, None)[:3]
    built = isinstance(model, nn.Module)
    return Workload(model=(lambda: call()[0]) if built else model, batch=batch, loss=loss), (BUILT,) if built else ()


def _sizes(function: Callable[..., Any], shape: Shape, text: str) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    asked = {field.name: getattr(shape, field.name) for field in fields(shape)}
    asked = {key: value for key, value in asked.items() if value is not None}
    unknown = [] if open_ended else [key for key in asked if key not in parameters]
    if unknown:
        raise ConfigError(
            f"{unknown[0]}={asked[unknown[0]]} was given, but {text} has no parameter {unknown[0]!r}",
            hint=f"give the function a parameter {unknown[0]!r}, or leave the size out",
        )
    return asked


def _load_module(place: str, text: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and not (place == error.name or place.startswith(f"{error.name}.")):
            raise ModelError(
                f"{text}: {place} needs {error.name}, which is not installed", hint="install it"
            ) from error
        raise ModelError(
            f"{text}: no module {place!r}, neither installed nor in {here}",
            hint="give module:function or file.py:function",
        ) from None
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{text}: importing {place} failed: {type(error).__name__}: {error}",
            hint=f"try `python -c 'import {place}'`",
        ) from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _load_file(path: Path, text: str) -> Any:
    if not path.is_file():
        raise ModelError(f"{text}: no file {path}", hint="give module:function or file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"{text}: {path} failed: {type(error).__name__}: {error}", hint=f"try `python {path}`"
        ) from error
    return module

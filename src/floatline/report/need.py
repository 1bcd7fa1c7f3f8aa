"""Load what only a report needs, where it is used, and say how to get it when it is missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from floatline.errors import ConfigError


def need(module: str) -> Any:
    """Import a module of the `report` extra.

    Args:
        module: Its dotted name.

    Returns:
        The module.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"the report page needs {package}, which cannot be imported ({error})",
            hint='pip install "floatline[report]"',
        ) from error
